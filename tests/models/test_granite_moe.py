"""GraniteMoE: its multipliers, its shared experts, and its header."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from reap2gguf.errors import UnsupportedModelError
from reap2gguf.models.from_gguf import model_from_gguf
from reap2gguf.models.granite_moe import GraniteMoe, GraniteMoeShared
from reap2gguf.models.table import BY_GGUF
from reap2gguf.models.transformers_config import check_with_transformers
from tests.families.granite import SHARED, TINY
from tests.models.drawn import ABSENT
from tests.models.layouts import stored_of
from tests.models.test_from_gguf import header_of

SCALES = {
    "attention_multiplier": ("attention.scale", 0.2),
    "embedding_multiplier": ("embedding_scale", 3.0),
    "residual_multiplier": ("residual_scale", 1.5),
    "logits_scaling": ("logit_scale", 6.0),
}


def model_of(tiny: Any = TINY, **changes: Any) -> Any:
    config = {k: v for k, v in {**tiny.config(), **changes}.items() if v is not ABSENT}
    cls = GraniteMoe if tiny is TINY else GraniteMoeShared
    return cls(config, "here/config.json", tiny.tensors().keys())


def values_of(model: Any) -> dict[str, Any]:
    return {one.key.removeprefix("granitemoe."): one.value for one in model.gguf_metadata()}


@pytest.mark.parametrize("name", SCALES)
def test_a_multiplier(name: str) -> None:
    key, value = SCALES[name]
    assert values_of(model_of())[key] == value
    # llama.cpp computes with another value than transformers if the key is absent
    without = model_of(**{name: ABSENT})
    check_with_transformers(without)
    assert values_of(without)[key] == 1.0
    for other in (0, -1.0, None, "1", float("inf")):
        with pytest.raises(UnsupportedModelError, match=name):
            values_of(model_of(**{name: other}))


def test_logits_are_divided() -> None:
    assert model_of().logits_divisor == 6.0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"head_dim": 32}, "head_dim 32, together 128, expected hidden_size, 64"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"num_local_experts": ABSENT, "num_experts": 8}, "num_local_experts is missing"),
        ({"intermediate_size": 0}, "intermediate_size is 0"),
    ],
    ids=str,
)
def test_what_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UnsupportedModelError, match=said):
        model_of(**changes)


def test_the_shared_expert() -> None:
    model = model_of(SHARED)
    assert values_of(model)["expert_shared_feed_forward_length"] == 160
    stored = SHARED.tensors()
    named = {tensor.name: tensor for tensor in model.gguf_tensors(stored_of(stored))}
    both = stored["model.layers.1.shared_mlp.input_linear.weight"].float().numpy()
    for name, half in (("gate", both[:160]), ("up", both[160:])):
        tensor = named[f"blk.1.ffn_{name}_shexp.weight"]
        assert tensor.shape == half.shape
        assert tensor.transform is not None
        np.testing.assert_array_equal(tensor.transform(both), half)
    names = ("blk.1.ffn_gate_shexp.weight", "blk.1.ffn_up_shexp.weight")
    assert model.matrices(1)["shared_mlp.input_linear"] == names


@pytest.mark.parametrize("width", [0, ABSENT])
def test_no_shared_expert(width: Any) -> None:
    model = model_of(SHARED, shared_intermediate_size=width)
    check_with_transformers(model)
    assert "expert_shared_feed_forward_length" not in values_of(model)
    assert not any("shared_mlp" in rule.stored for rule in model.rules(0))
    for other in (-1, None, "8"):
        with pytest.raises(UnsupportedModelError, match="shared_intermediate_size"):
            model_of(SHARED, shared_intermediate_size=other).sizes()


def test_what_llama_cpp_takes_for_absent_keys() -> None:
    header = header_of(model_of(), stored_of(TINY.tensors()))
    gone = {f"granitemoe.{SCALES[name][0]}" for name in SCALES if name != "logits_scaling"}
    metadata = {key: value for key, value in header.metadata.items() if key not in gone}
    found = model_from_gguf(replace(header, metadata=metadata), BY_GGUF).config
    assert found["attention_multiplier"] == 0.25  # of heads of 16
    assert found["embedding_multiplier"] == found["residual_multiplier"] == 1.0
    del metadata["granitemoe.logit_scale"]
    with pytest.raises(UnsupportedModelError, match="logit_scale is missing"):
        model_from_gguf(replace(header, metadata=metadata), BY_GGUF)
