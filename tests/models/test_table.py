from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.checkpoint.index import SINGLE_NAME
from reap2gguf.errors import CheckpointError, UnknownTensorError, UnsupportedModelError
from reap2gguf.models.contract import MoeModel
from reap2gguf.models.table import ARCHITECTURES, describe
from tests.tiny import TinyQwen3Moe


def changed(folder: Path, **changes: Any) -> Checkpoint:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: v for key, v in config.items() if v != "removed"}))
    return Checkpoint.open(folder)


def refusal(folder: Path, **changes: Any) -> str:
    with changed(folder, **changes) as checkpoint, pytest.raises(UnsupportedModelError) as caught:
        describe(checkpoint)
    assert str(folder / "config.json") in str(caught.value)
    return str(caught.value)


def test_the_example(example: Path) -> None:
    with Checkpoint.open(example) as checkpoint:
        assert describe(checkpoint).facts.n_experts == 16


@pytest.mark.parametrize("n_shards", [1, 3])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_layouts(tmp_path: Path, n_shards: int, fused: bool, tied: bool) -> None:
    tiny = TinyQwen3Moe(vocab=32, n_shards=n_shards, fused=fused, tied=tied)
    with Checkpoint.open(tiny.write(tmp_path / "model")) as checkpoint:
        facts = describe(checkpoint).facts
    assert (facts.n_experts, facts.tied_embeddings) == (8, tied)


def test_sparse_step_of_two(tmp_path: Path) -> None:
    folder = TinyQwen3Moe(vocab=32, n_layers=4, dense_layers=(0, 2)).write(tmp_path / "model")
    with changed(folder, mlp_only_layers=[], decoder_sparse_step=2) as checkpoint:
        model = describe(checkpoint)
        assert model.facts.moe_layers == (1, 3)
        assert model.gguf_tensors(checkpoint.tensors)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_table(name: str) -> None:
    entry = ARCHITECTURES[name]
    assert issubclass(entry, MoeModel)
    model_type = getattr(transformers, name).config_class.model_type
    assert model_type.removesuffix("_text") == entry.model_type


@pytest.mark.parametrize("names", [["LlamaForCausalLM"], [], None, "removed", "Qwen3", [7], {}])
def test_not_an_moe(tiny: Path, names: Any) -> None:
    assert "has no experts" in refusal(tiny, architectures=names, num_experts="removed")


@pytest.mark.parametrize(
    "key", ["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"]
)
@pytest.mark.parametrize("nested", [True, False])
def test_an_moe_that_is_not_in_the_table(tiny: Path, key: str, nested: bool) -> None:
    counts = {"text_config": {key: 8}} if nested else {key: 8}
    changes = {"num_experts": "removed"} | counts
    message = refusal(tiny, architectures=["OtherMoeForCausalLM"], **changes)
    assert "OtherMoeForCausalLM is not implemented" in message
    assert "Qwen3MoeForCausalLM" in message


def test_a_config_of_another_model_type(tiny: Path) -> None:
    assert "model_type is 'mixtral'" in refusal(tiny, model_type="mixtral")


def test_more_experts_in_the_config_than_stored(tiny: Path) -> None:
    with changed(tiny, num_experts=9) as checkpoint, pytest.raises(CheckpointError, match="9"):
        describe(checkpoint)


def test_fewer_layers_in_the_config_than_stored(tiny: Path) -> None:
    with (
        changed(tiny, num_hidden_layers=1) as checkpoint,
        pytest.raises(UnknownTensorError, match=r"model\.layers\.1\."),
    ):
        describe(checkpoint)


def test_more_layers_in_the_config_than_stored(tiny: Path) -> None:
    with (
        changed(tiny, num_hidden_layers=3) as checkpoint,
        pytest.raises(CheckpointError, match=r"model\.layers\.2\."),
    ):
        describe(checkpoint).gguf_tensors(checkpoint.tensors)


def test_a_tensor_too_many(tiny: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(tiny / SINGLE_NAME) | {"model.extra.weight": torch.ones(2)}
    save_file(tensors, tiny / SINGLE_NAME)
    with (
        Checkpoint.open(tiny) as checkpoint,
        pytest.raises(UnknownTensorError, match=r"'model\.extra\.weight'"),
    ):
        describe(checkpoint)
