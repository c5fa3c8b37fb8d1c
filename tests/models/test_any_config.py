"""Any config is refused in the plan, or llama.cpp computes what transformers does.

Configs are drawn with every field inside and outside of its range, in every spelling and layout.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from reap2gguf.errors import Reap2ggufError
from reap2gguf.models.rope import Rope
from tests.models.drawn import Drawn
from tests.models.layouts import every_family
from tests.models.oracles import (
    SMALL_VOCAB,
    mean_kl,
    of_llama_cpp,
    of_transformers,
    planned,
    pruned,
)
from tests.tiny import TinyQwen3Moe

MOST_KL = 1e-4


def check(drawn: Drawn) -> str:
    """`refused`, `not for llama.cpp` if the plan says so, or `the same`."""
    try:
        return compared(drawn)
    except Different:
        # a router may hang on the last bit of a score; it does not in two models
        return compared(replace(drawn, tiny=replace(drawn.tiny, seed=1)))


class Different(AssertionError):
    """The logits of two programs differ."""


def expect_same(theirs: torch.Tensor, ours: torch.Tensor) -> None:
    kl = mean_kl(theirs, ours)
    if not kl < MOST_KL:
        raise Different(f"mean KL {kl:g}")


def compared(drawn: Drawn) -> str:
    folder = Path(tempfile.mkdtemp())
    try:
        drawn.write(folder / "model")
        try:
            model = planned(folder / "model")
        except Reap2ggufError:
            return "refused"
        if any("llama.cpp cannot load them" in caveat for caveat in model.caveats()):
            return "not for llama.cpp"
        vocab = model.facts.vocab_size
        ours = pruned(folder / "model", folder / "pruned")
        found = of_llama_cpp(ours, folder, vocab)
        expect_same(of_transformers(ours, vocab), found)
        if model.is_nested:
            expect_same(of_transformers(ours, vocab, with_tower=True), found)
        if not any("pruned config.json" in caveat for caveat in model.caveats()):
            expect_same(of_transformers(folder / "model", vocab), found)
        return "the same"
    finally:
        shutil.rmtree(folder)


ANY = st.one_of(*(drawn for family in every_family() for drawn in family.CONFIGS))
PLAIN = TinyQwen3Moe(
    n_layers=2, hidden=64, n_experts=4, n_heads=4, n_kv_heads=2, head_dim=16, vocab=SMALL_VOCAB
)


@given(drawn=ANY)
@settings(max_examples=8, phases=[Phase.generate])
def test_a_few_configs(drawn: Drawn) -> None:
    check(drawn)


@pytest.mark.slow
@given(drawn=ANY)
@settings(max_examples=200, phases=[Phase.generate, Phase.shrink])
def test_a_config_is_refused_or_means_the_same_everywhere(drawn: Drawn) -> None:
    check(drawn)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
        {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.0},
        {"rope_type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 0.5},
        {"rope_type": "yarn", "factor": 0.5},
    ],
    ids=str,
)
def test_scaled_rotary_embeddings(rope: dict[str, Any]) -> None:
    text = (("rope_scaling", rope), ("rope_theta", 1000.0))
    assert check(Drawn(PLAIN, "as configured", text, ())) == "the same"


@pytest.mark.parametrize("key", ["rope.freq_base", "rope.scaling.attn_factor"])
def test_a_wrong_key_is_seen(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the other tests rest on: that the logits hang on every key."""
    yarn = {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.0}
    drawn = Drawn(PLAIN, "as configured", (("rope_scaling", yarn),), ())
    right = Rope.metadata

    def without(self: Rope) -> list[Any]:
        return [e if not e[0].endswith(key) else (e[0], e[1] * 1.5, e[2]) for e in right(self)]

    monkeypatch.setattr(Rope, "metadata", without)
    with pytest.raises(Different):
        check(drawn)
