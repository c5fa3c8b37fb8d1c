from __future__ import annotations

import re
from pathlib import Path

import pytest

from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.errors import CheckpointError, UnknownTensorError
from reap2gguf.models.foreign import foreign_layout
from reap2gguf.models.table import describe
from tests.tiny import TinyQwen3Moe, TinyQwen35Moe, save_sharded

TINY = TinyQwen3Moe(hidden=32)
LORA = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (f"{LORA}.lora_A.weight", "merge_and_unload"),
        (f"{LORA}.lora_B.default.weight", "merge_and_unload"),
        (f"{LORA}.base_layer.weight", "merge_and_unload"),
        ("model.layers.0.self_attn.q_proj.lora_A.weight", "merge_and_unload"),
        ("model.layers.0.mlp.switch_mlp.up_proj.weight", "MLX"),
        ("_orig_mod.model.norm.weight", "torch.compile"),
        ("model._orig_mod.layers.0.input_layernorm.weight", "torch.compile"),
        ("module.model.norm.weight", "DistributedDataParallel"),
        ("_fsdp_wrapped_module.model.norm.weight", "FSDP"),
        ("language_model.model.norm.weight", "vision-language savers"),
        ("language_model.lm_head.weight", "vision-language savers"),
        ("decoder.layers.0.mlp.experts.linear_fc1.weight", "Megatron"),
        ("model.layers.0.self_attn.qkv_proj.weight", "vLLM"),
        ("ernie.layers.0.self_attn.qkv_proj.weight", "ends in -PT"),
        ("model.layers.1.mlp.experts.0.up_gate_proj.weight", "PaddlePaddle"),
    ],
)
def test_what_wrote_a_checkpoint(name: str, words: str, tmp_path: Path) -> None:
    found = foreign_layout([name])
    assert found is not None
    assert repr(name) in found
    assert words in found
    folder = TINY.write(tmp_path / "m")
    tensors = TINY.tensors()
    save_sharded(tensors | {name: tensors["model.norm.weight"].clone()}, folder, 1)
    with Checkpoint.open(folder) as checkpoint, pytest.raises(UnknownTensorError, match=words):
        describe(checkpoint)


@pytest.mark.parametrize("prefix", ["base_model.model.", "_orig_mod.", "module."])
def test_all_names_with_a_prefix(prefix: str, tmp_path: Path) -> None:
    folder = TINY.write(tmp_path / "m")
    save_sharded({prefix + name: t for name, t in TINY.tensors().items()}, folder, 1)
    with Checkpoint.open(folder) as checkpoint, pytest.raises(UnknownTensorError) as caught:
        describe(checkpoint)
    assert "this is" in str(caught.value)


@pytest.mark.parametrize("tiny", [TINY, TinyQwen35Moe(), TinyQwen35Moe(nested=False)])
def test_checkpoints_of_transformers_are_no_strangers(tiny: TinyQwen3Moe | TinyQwen35Moe) -> None:
    assert foreign_layout(tiny.tensors()) is None


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ((0, 1, 2, 3, 4, 5, 6, 9), "of 8 experts are numbered 0 to 9 with gaps"),
        ((1, 2, 3, 4, 5, 6, 7, 8), "of 8 experts are numbered 1 to 8 with gaps"),
        ((0, 1, 2, 3, 4, 5, 6), "of expert 7 is missing: found 7 experts, expected 8"),
        ((0, 1, 2, 3, 4, 5, 6, 7, 8), "of expert 8 is beyond the config's count"),
    ],
)
def test_numbers_of_experts(numbers: tuple[int, ...], words: str, tmp_path: Path) -> None:
    folder = TINY.write(tmp_path / "m")
    tensors = TINY.tensors()
    pattern = re.compile(r"(model\.layers\.1\.mlp\.experts\.)(\d+)(\..*)")
    found = {name: t for name, t in tensors.items() if not pattern.fullmatch(name)}
    for number in numbers:
        for end in (".gate_proj.weight", ".up_proj.weight", ".down_proj.weight"):
            stored = tensors[f"model.layers.1.mlp.experts.{min(number, 7)}{end}"]
            found[f"model.layers.1.mlp.experts.{number}{end}"] = stored.clone()
    save_sharded(found, folder, 1)
    with Checkpoint.open(folder) as checkpoint, pytest.raises(CheckpointError) as caught:
        describe(checkpoint)
    assert words in str(caught.value)
    assert str(caught.value).startswith("layer 1: ")
