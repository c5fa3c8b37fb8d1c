"""Damaged and unsupported quantized checkpoints are refused, each in one line that says why."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.errors import CheckpointError, Reap2ggufError, UnsupportedModelError
from reap2gguf.models.table import describe
from tests.families.qwen_vl import TinyQwen3Vl
from tests.quantized import Tensors, as_compressed_fp8, as_fp8, as_mxfp4, as_packed
from tests.tiny import REPOSITORY, TinyQwen3Moe, save_sharded

Section = dict[str, Any]
Damage = Callable[[Tensors, Section], object]
TINY = TinyQwen3Moe()
FP8, INT4, CHANNELS = as_fp8(TINY), as_packed(TINY), as_compressed_fp8(TINY)
MXFP4 = as_mxfp4(TinyQwen3Vl(width=96, vision=False))
Q = "model.layers.0.self_attn.q_proj.weight"
E = "model.layers.1.mlp.experts.6.down_proj.weight"
G = "model.language_model.layers.1.mlp.experts.gate_up_proj"


def drop(name: str) -> Damage:
    return lambda tensors, section: tensors.pop(name)


def put(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Damage:
    return lambda tensors, section: tensors.update({name: change(tensors[name]).contiguous()})


def add(name: str, tensor: torch.Tensor) -> Damage:
    return lambda tensors, section: tensors.update({name: tensor})


def say(**values: Any) -> Damage:
    return lambda tensors, section: section.update(values)


def weights(**values: Any) -> Damage:
    def change(tensors: Tensors, section: Section) -> None:
        section["config_groups"] = {
            "group_0": {"weights": section["config_groups"]["group_0"]["weights"] | values}
        }

    return change


def two_groups(tensors: Tensors, section: Section) -> None:
    first = section["config_groups"]["group_0"]
    other = {"weights": first["weights"] | {"group_size": 64}}
    section["config_groups"] = {"group_0": first, "group_1": other}


DAMAGED: dict[str, tuple[Any, Damage, str]] = {
    "scale missing": (FP8, drop(f"{E}_scale_inv"), f"{E}_scale_inv' is missing"),
    "values missing": (FP8, drop(E), f"'{E}' is missing"),
    "scale of too few rows": (
        FP8, put(f"{Q}_scale_inv", lambda t: t[:-1]),
        "of shape [3, 4], expected [4, 4]: a scale for each 16 x 16 of [64, 64]",
    ),
    "scale transposed": (FP8, put(f"{E}_scale_inv", lambda t: t.T), "of shape [2, 4], expected"),
    "scale of one value": (FP8, put(f"{Q}_scale_inv", lambda t: t[:1, :1]), "of shape [1, 1]"),
    "scale of whole numbers": (
        FP8, put(f"{Q}_scale_inv", lambda t: t.int()), "stored as I32, expected F32 or F16 or BF16",
    ),
    "values in BF16": (FP8, put(Q, lambda t: t.float().bfloat16()), "stored as BF16, expected F8"),
    "values in E5M2": (
        FP8, put(Q, lambda t: t.float().to(torch.float8_e5m2)), "stored as F8_E5M2, expected F8"
    ),
    "values in one row": (FP8, put(Q, lambda t: t.reshape(-1)), "expected a matrix"),
    "values of another shape": (FP8, put(Q, lambda t: t[:32]), "of shape [4, 4], expected [2, 4]"),
    "block of no rows": (
        FP8, say(weight_block_size=[0, 16]), "weight_block_size is [0, 16], expected [rows"
    ),
    "block of one number": (FP8, say(weight_block_size=16), "weight_block_size is 16"),
    "block of text": (FP8, say(weight_block_size=["16", 16]), "weight_block_size is ['16', 16]"),
    "another block": (FP8, say(weight_block_size=[32, 32]), "a scale for each 32 x 32"),
    "other bytes": (FP8, say(fmt="e5m2"), "fmt is 'e5m2', expected 'e4m3'"),
    "packed words missing": (INT4, drop(f"{E}_packed"), f"{E}_packed' is missing"),
    "packed scale missing": (INT4, drop(f"{E}_scale"), f"{E}_scale' is missing"),
    "shape missing": (INT4, drop(f"{E}_shape"), f"{E}_shape' is missing"),
    "words of 64 bits": (INT4, put(f"{E}_packed", lambda t: t.long()), "I64, expected I32"),
    "words in one row": (INT4, put(f"{E}_packed", lambda t: t.reshape(-1)), "a matrix of words"),
    "too few words": (
        INT4, put(f"{Q}_packed", lambda t: t[:, :-1]),
        "of shape [64, 7], expected 8 words per row, for 64 numbers of 4 bits",
    ),
    "too few rows of scales": (
        INT4, put(f"{Q}_scale", lambda t: t[:60]), "of shape [60, 2], expected [64, 2]"
    ),
    "shape of three": (
        INT4, put(f"{Q}_shape", lambda t: torch.tensor([1, 64, 64])), "expected two whole numbers"
    ),
    "zero points": (INT4, add(f"{Q}_zero_point", torch.zeros(8, 2).int()), "is a zero point"),
    "order of columns": (INT4, add(f"{Q}_g_idx", torch.zeros(64).int()), "is an order of"),
    "asymmetric": (INT4, weights(symmetric=False), "symmetric is False, expected True"),
    "act-order": (INT4, weights(actorder="group"), "actorder is 'group'"),
    "three bits": (INT4, weights(num_bits=3), "3 bits of 'int' in the format 'pack-quantized'"),
    "group of no columns": (INT4, weights(group_size=0), "group_size is 0, expected an integer"),
    "no strategy": (INT4, weights(strategy="tensor_group"), "strategy is 'tensor_group', expected"),
    "one scale for all": (INT4, weights(strategy="tensor"), "expected 'group' or 'channel'"),
    "two ways": (INT4, two_groups, "quantize weights in 2 ways"),
    "no groups": (INT4, say(config_groups={}), "config_groups is empty"),
    "groups in a list": (INT4, say(config_groups=[1]), "config_groups is [1], expected an object"),
    "NVFP4": (
        INT4, say(format="nvfp4-pack-quantized"), "the format 'nvfp4-pack-quantized', which is not"
    ),
    "rotated": (CHANNELS, say(transform_config={"a": 1}), "transform_config is set"),
    "sparse": (CHANNELS, say(sparsity_config={"format": "sparse-24"}), "sparsity_config is set"),
    "8-bit numbers": (
        CHANNELS, put(Q, lambda t: t.float().to(torch.int8)), "is stored as I8"
    ),
    "channels without scales": (CHANNELS, drop(f"{Q}_scale"), f"{Q}_scale' is missing"),
    "blocks missing": (MXFP4, drop(f"{G}_blocks"), f"{G}_blocks' is missing"),
    "exponents missing": (MXFP4, drop(f"{G}_scales"), f"{G}_scales' is missing"),
    "exponents as floats": (
        MXFP4, put(f"{G}_scales", lambda t: t.float()), "stored as F32, expected U8"
    ),
    "too few exponents": (
        MXFP4, put(f"{G}_scales", lambda t: t[..., :-1]), "shape [8, 192, 1], expected [8, 192, 2]"
    ),
    "blocks of eight bytes": (
        MXFP4, put(f"{G}_blocks", lambda t: t[..., :8]), "(experts, rows, blocks, 16)"
    ),
    "GPTQ": (FP8, say(quant_method="gptq"), "(quantization_config: 'gptq') in a way that is not"),
    "AWQ": (FP8, say(quant_method="awq"), "'awq'"),
    "bitsandbytes": (FP8, say(quant_method="bitsandbytes"), "'bitsandbytes'"),
    "modelopt": (FP8, say(quant_method="modelopt", quant_algo="NVFP4"), "'modelopt'"),
    "no method": (FP8, lambda tensors, section: section.clear(), "pass the BF16 checkpoint"),
    "a list for a method": (FP8, say(quant_method=["fp8"]), "pass the BF16 checkpoint"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
def test_refusals(name: str, tmp_path: Path) -> None:
    case, damage, words = DAMAGED[name]
    folder, tensors, config = case.write(tmp_path / "m"), case.tensors(), case.config()
    damage(tensors, config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))
    save_sharded(tensors, folder, 1)
    with pytest.raises(Reap2ggufError) as caught, Checkpoint.open(folder) as opened:
        describe(opened)
    message = str(caught.value)
    assert isinstance(caught.value, CheckpointError | UnsupportedModelError)
    assert words in message
    assert "\n" not in message
    assert str(folder) in message
    assert any(what in message for what in ("download", "BF16", "correct", "expected an"))
    if "docs/" in message:
        assert (REPOSITORY / "docs" / "quantized-sources.md").is_file()


def test_what_belongs_to_inputs_stays_with_its_weight(tmp_path: Path) -> None:
    """Scales of inputs (a "static" activation_scheme) decode nothing, and are dropped with it."""
    folder, tensors = FP8.write(tmp_path / "m"), FP8.tensors()
    tensors[E.replace("weight", "input_scale")] = torch.ones(1)
    save_sharded(tensors, folder, 1)
    with Checkpoint.open(folder) as opened:
        describe(opened)
        assert opened.parts(E) == (E, f"{E}_scale_inv", E.replace("weight", "input_scale"))


def test_two_ways_of_one_kind_each_are_read(tmp_path: Path) -> None:
    """FP8 attention beside int4 experts, as mixed checkpoints of compressed-tensors are."""
    folder = INT4.write(tmp_path / "m")
    tensors = INT4.tensors() | {n: t for n, t in CHANNELS.tensors().items() if "self_attn" in n}
    for name in [n for n in tensors if "self_attn" in n and n.endswith(("_packed", "_shape"))]:
        del tensors[name]
    config = INT4.config()
    first = config["quantization_config"]["config_groups"]["group_0"]
    of_attention = CHANNELS.section["config_groups"]["group_0"] | {"format": "float-quantized"}
    config["quantization_config"] |= {
        "format": "mixed-precision",
        "config_groups": {"a": of_attention, "b": first | {"format": "pack-quantized"}},
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_sharded(tensors, folder, 1)
    with Checkpoint.open(folder) as opened:
        describe(opened)
        assert (opened.kind(Q), opened.kind(E)) == ("F8_E4M3", "INT4")
        with Checkpoint.open(INT4.write(tmp_path / "int4")) as other:
            assert (opened.read_float32(E) == other.read_float32(E)).all()
