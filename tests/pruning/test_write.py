from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.errors import UnknownTensorError
from reap2gguf.models.table import describe
from reap2gguf.progress import Silent
from reap2gguf.pruning.view import PrunedView
from reap2gguf.pruning.write import companion_files, write_pruned
from tests.tiny import TinyQwen3Moe

KEPT = {0: (0, 2, 3, 7), 1: (1, 4, 5, 6), 2: (0, 1, 2, 3)}


def prune(spec: TinyQwen3Moe, folder: Path, max_shard_bytes: int = 10**9) -> Path:
    pruned = folder / "pruned"
    pruned.mkdir()
    with Checkpoint.open(spec.write(folder / "source")) as source:
        model = describe(source)
        kept = {layer: KEPT[layer] for layer in model.facts.moe_layers}
        write_pruned(PrunedView(source, model, kept), pruned, Silent(), max_shard_bytes)
    return pruned


def load(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for shard in folder.glob("*.safetensors") for k, v in load_file(shard).items()}


def expected(spec: TinyQwen3Moe) -> dict[str, torch.Tensor]:
    """The pruned weights, sliced in memory by torch."""
    found = {}
    for name, tensor in spec.tensors().items():
        parts = name.split(".")
        layer = int(parts[2]) if parts[1] == "layers" else -1
        if "experts" in parts and not spec.fused:
            expert = int(parts[parts.index("experts") + 1])
            if expert in KEPT[layer]:
                parts[parts.index("experts") + 1] = str(KEPT[layer].index(expert))
                found[".".join(parts)] = tensor
        elif "experts" in parts or name.endswith("mlp.gate.weight"):
            found[name] = tensor[list(KEPT[layer])]
        else:
            found[name] = tensor
    return found


@pytest.mark.parametrize(
    "spec",
    [
        TinyQwen3Moe(),
        TinyQwen3Moe(fused=True),
        TinyQwen3Moe(n_layers=3, dense_layers=(1,), n_shards=2),
        TinyQwen3Moe(dtype=torch.float32, tied=True),
    ],
    ids=["2d", "3d", "dense", "float32"],
)
def test_stored_tensors_are_sliced_and_the_rest_copied(spec: TinyQwen3Moe, tmp_path: Path) -> None:
    pruned = load(prune(spec, tmp_path))
    wanted = expected(spec)
    assert set(pruned) == set(wanted)
    for name, tensor in wanted.items():
        assert pruned[name].dtype == tensor.dtype
        assert torch.equal(pruned[name], tensor), name


@pytest.mark.parametrize("key", ["num_experts", "num_local_experts"])
def test_the_config_says_how_many_are_left(key: str, tmp_path: Path) -> None:
    spec = TinyQwen3Moe(count_key=key)
    config = json.loads((prune(spec, tmp_path) / "config.json").read_text())
    assert config == spec.config() | {key: 4}


def test_both_spellings_are_rewritten(tmp_path: Path) -> None:
    spec = TinyQwen3Moe()
    folder = spec.write(tmp_path / "source")
    (folder / "config.json").write_text(json.dumps(spec.config() | {"num_local_experts": 8}))
    with Checkpoint.open(folder) as checkpoint:
        model = describe(checkpoint)
    assert model.pruned_config(4)["num_experts"] == 4
    assert model.pruned_config(4)["num_local_experts"] == 4


def test_shards_and_index(tmp_path: Path) -> None:
    spec = TinyQwen3Moe()
    pruned = prune(spec, tmp_path, max_shard_bytes=100_000)
    names = sorted(shard.name for shard in pruned.glob("*.safetensors"))
    assert len(names) > 2
    assert names[0] == f"model-00001-of-{len(names):05d}.safetensors"
    index = json.loads((pruned / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(names)
    assert set(index["weight_map"]) == set(expected(spec))
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in expected(spec).values())


def test_transformers_loads_it_and_drops_as_the_mask_would(tmp_path: Path) -> None:
    """A pruned model equals the source whose router can never pick the experts that went."""
    spec = TinyQwen3Moe(dtype=torch.float32)
    pruned = AutoModelForCausalLM.from_pretrained(prune(spec, tmp_path), dtype=torch.float32)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "source", dtype=torch.float32)
    for layer, kept in enumerate((KEPT[0], KEPT[1])):
        gone = [e for e in range(8) if e not in kept]

        def mask(module, arguments, output, gone=gone):  # type: ignore[no-untyped-def]
            logits = torch.nn.functional.linear(arguments[0].reshape(-1, 64), module.weight)
            logits[:, gone] = -torch.inf
            top, indices = torch.topk(logits.softmax(-1), 2, dim=-1)
            return logits, top / top.sum(-1, keepdim=True), indices

        whole.model.layers[layer].mlp.gate.register_forward_hook(mask)
    tokens = torch.arange(3, 60)[None]
    with torch.inference_mode():
        difference = pruned(tokens).logits - whole(tokens).logits
    assert difference.abs().max() < 1e-4


def test_tokenizer_and_licence_travel_but_no_foreign_file(tmp_path: Path) -> None:
    folder = TinyQwen3Moe().write(tmp_path / "source")
    for name in ("LICENSE", "generation_config.json", "README.md", "reap2gguf.json", "run.py"):
        (folder / name).write_text("{}")
    names = {file.name for file in companion_files(folder)}
    assert names == {
        "LICENSE", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja",
    }  # fmt: skip


def test_a_tensor_no_rule_explains_is_no_skip(tmp_path: Path) -> None:
    spec = TinyQwen3Moe()
    folder = spec.write(tmp_path / "odd")
    save_file(spec.tensors() | {"model.extra": torch.zeros(2)}, folder / "model.safetensors")
    with (
        Checkpoint.open(folder) as checkpoint,
        pytest.raises(UnknownTensorError, match=r"model\.extra"),
    ):
        describe(checkpoint)


def test_the_view_has_the_source_order(tmp_path: Path) -> None:
    with Checkpoint.open(TinyQwen3Moe().write(tmp_path / "source")) as source:
        view = PrunedView(source, describe(source), {0: KEPT[0], 1: KEPT[1]})
    origins = [view.origin(name)[0] for name in view.tensors]
    assert origins == [name for name in source.tensors if name in origins]
