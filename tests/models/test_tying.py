"""Whether the output matrix is the token embedding: the stored tensors decide, at every nesting."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from reap2gguf.building.plan import make_plan
from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.errors import CheckpointError, UnsupportedModelError
from reap2gguf.models.description import Carried
from reap2gguf.models.table import describe
from reap2gguf.pruning.view import PrunedView
from tests.building.builds import options
from tests.exporting.files import write_small_tokenizer
from tests.models.oracles import SMALL_VOCAB, mean_kl, of_llama_cpp, of_transformers, pruned
from tests.tiny import TinyQwen3Moe, TinyQwen35Moe, save_sharded

QWEN3 = TinyQwen3Moe(hidden=32, tied=True)
FLAT = TinyQwen35Moe(hidden=32, layers="lf", mtp=False, nested=False, tied=True)
NESTED = TinyQwen35Moe(hidden=32, layers="lf", mtp=False, tied=True, n_experts=3, vocab=SMALL_VOCAB)
KEY = "tie_word_embeddings"
SAID = {None: "absent", True: "tied", False: "not tied"}


def write(
    folder: Path, tiny: Any, head: str, outer: bool | None = True, inner: bool | None = None
) -> Path:
    """A checkpoint whose head is none, a copy of the embedding, nearly one, or its own."""
    tiny.write(folder)
    if tiny.vocab == SMALL_VOCAB:
        write_small_tokenizer(folder)
    tensors = tiny.tensors()
    embedding = next(t for name, t in tensors.items() if name.endswith("embed_tokens.weight"))
    if head != "none":
        tensors["lm_head.weight"] = embedding.clone()
    if head == "nearly a copy":
        tensors["lm_head.weight"][-1, -1] += 1
    if head == "own":
        tensors["lm_head.weight"] = (embedding.flip(0) * 2).contiguous()
    save_sharded(tensors, folder, 1)
    config = tiny.config()
    for level, said in ((config, outer), (config.get("text_config"), inner)):
        if level is not None:
            for key in (KEY, "bos_token_id", "eos_token_id", "pad_token_id"):
                level.pop(key, None)
            if said is not None:
                level[KEY] = said
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("tiny", [QWEN3, FLAT], ids=["Qwen3", "flat Qwen3.5"])
@pytest.mark.parametrize("head", ["own", "nearly a copy"])
def test_a_head_of_its_own(tiny: Any, head: str, tmp_path: Path) -> None:
    with Checkpoint.open(write(tmp_path / "m", tiny, head)) as checkpoint:
        model = describe(checkpoint)
        assert not model.facts.tied_embeddings
        assert model.head_name == "lm_head.weight"
        assert "output.weight" in {t.name for t in model.gguf_tensors(checkpoint.tensors)}
        assert any("a different lm_head.weight is stored" in c for c in model.caveats())
        view = PrunedView(checkpoint, model, dict.fromkeys(model.facts.moe_layers, (0, 2, 5)))
        assert view.config[KEY] is False
        assert view.model.caveats() == ()
        assert not view.model.facts.tied_embeddings


@pytest.mark.parametrize("tiny", [QWEN3, FLAT], ids=["Qwen3", "flat Qwen3.5"])
@pytest.mark.parametrize("head", ["none", "copy"])
def test_a_tied_head(tiny: Any, head: str, tmp_path: Path) -> None:
    with Checkpoint.open(write(tmp_path / "m", tiny, head)) as checkpoint:
        model = describe(checkpoint)
        assert model.facts.tied_embeddings
        assert model.caveats() == ()
        assert "output.weight" not in {t.name for t in model.gguf_tensors(checkpoint.tensors)}
        assert model.pruned_config(3)[KEY] is True
        if head == "copy":
            assert model.role("lm_head.weight") == Carried()


@pytest.mark.parametrize("said", [False, None])
def test_no_head_and_not_tied(said: bool | None, tmp_path: Path) -> None:
    folder = write(tmp_path / "m", QWEN3, "none", said)
    with Checkpoint.open(folder) as checkpoint, pytest.raises(CheckpointError, match="lm_head"):
        describe(checkpoint)


@pytest.mark.parametrize("tiny", [QWEN3, FLAT, NESTED], ids=["Qwen3", "flat", "nested"])
def test_null_is_refused(tiny: Any, tmp_path: Path) -> None:
    folder = write(tmp_path / "m", tiny, "none")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {KEY: None}))
    with Checkpoint.open(folder) as checkpoint, pytest.raises(UnsupportedModelError, match=KEY):
        describe(checkpoint)


@pytest.mark.parametrize("head", ["none", "copy", "own"])
@pytest.mark.parametrize(
    ("outer", "inner"), list(product([True, False, None], repeat=2)), ids=lambda said: SAID[said]
)
def test_both_levels_of_a_nested_config(
    outer: bool | None, inner: bool | None, head: str, tmp_path: Path
) -> None:
    """Both of transformers' classes, which read different levels, get the same from ours."""
    folder = write(tmp_path / "m", NESTED, head, outer, inner)
    says_so = bool(outer or inner)
    with Checkpoint.open(folder) as checkpoint:
        if head == "none" and not says_so:
            with pytest.raises(CheckpointError, match="lm_head"):
                describe(checkpoint)
            return
        model = describe(checkpoint)
    tied = model.facts.tied_embeddings
    if head != "copy":  # else both are right
        assert tied is (head == "none")
    told = any("pruned config.json says" in caveat for caveat in model.caveats())
    disagree = bool(outer) is not bool(inner)
    assert told is (disagree if head == "none" else head == "own" and says_so)
    ours = pruned(folder, tmp_path / "pruned")
    config = json.loads((ours / "config.json").read_text())
    assert [level.get(KEY, False) for level in (config, config["text_config"])] == [tied] * 2
    found = of_llama_cpp(ours, tmp_path, SMALL_VOCAB)
    for with_tower in (False, True):
        assert mean_kl(of_transformers(ours, SMALL_VOCAB, with_tower), found) < 1e-5


def test_the_plan_says_it(tmp_path: Path) -> None:
    plan = make_plan(options(write(tmp_path / "m", QWEN3, "own"), tmp_path / "out"))
    assert any("a different lm_head.weight" in caveat for caveat in plan.model.caveats())
    assert any(entry.tensor.name == "output.weight" for entry in plan.recipes[0].table)
    plan.checkpoint.close()


def test_values_are_compared_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[str] = []
    right = Checkpoint.read_bytes

    def counted(self: Checkpoint, name: str, first: int, buffer: np.ndarray) -> None:
        reads.append(name)
        right(self, name, first, buffer)

    monkeypatch.setattr(Checkpoint, "read_bytes", counted)
    with Checkpoint.open(write(tmp_path / "m", QWEN3, "copy")) as checkpoint:
        model = describe(checkpoint)
        PrunedView(checkpoint, model, dict.fromkeys(model.facts.moe_layers, (0, 1)))
    assert sorted(reads) == ["lm_head.weight", "model.embed_tokens.weight"]
    reads.clear()
    with Checkpoint.open(write(tmp_path / "n", QWEN3, "own", outer=False)) as checkpoint:
        describe(checkpoint)
    assert reads == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_copy_of_another_type(dtype: torch.dtype, tmp_path: Path) -> None:
    folder = QWEN3.write(tmp_path / "m")
    tensors = QWEN3.tensors()
    values = tensors["model.embed_tokens.weight"]
    tensors["lm_head.weight"] = values.to(dtype)
    save_sharded(tensors, folder, 1)
    is_exact = torch.equal(values.to(dtype).float(), values.float())
    with Checkpoint.open(folder) as checkpoint:
        assert describe(checkpoint).facts.tied_embeddings is is_exact
