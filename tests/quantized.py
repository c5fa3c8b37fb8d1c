"""Quantized variants of the tiny checkpoints, in the layouts that are published.

Weights are quantized here by the definitions of the formats; what they decode to is compared with
transformers, compressed-tensors and llama.cpp in the tests.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tests.tiny import save_sharded

Tensors = dict[str, torch.Tensor]
LARGEST_FP8 = 448.0
_FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def fp8(name: str, weight: torch.Tensor, block: tuple[int, int] | None) -> Tensors:
    """A weight as DeepSeek-V3 and Qwen3-FP8 store it: scales of blocks, or a scale of all of it."""
    values, scale = _fp8(weight, block or tuple(weight.shape[-2:]))
    if block is None:
        scale = scale.reshape(weight.shape[:-2])
    return {name: values, f"{name}_scale_inv": scale}


def _fp8(weight: torch.Tensor, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Values, and a float32 scale for each block, of which the last may be smaller."""
    wide = weight.float()
    rows, columns = wide.shape[-2:]
    grid = -(-rows // block[0]), -(-columns // block[1])
    scale = torch.empty(*wide.shape[:-2], *grid)
    values = torch.empty(wide.shape, dtype=torch.float8_e4m3fn)
    for i in range(grid[0]):
        for j in range(grid[1]):
            at = (
                ...,
                slice(i * block[0], (i + 1) * block[0]),
                slice(j * block[1], (j + 1) * block[1]),
            )
            most = wide[at].abs().amax((-2, -1)) / LARGEST_FP8
            scale[..., i, j] = most
            values[at] = (wide[at] / most[..., None, None]).to(torch.float8_e4m3fn)
    return values, scale


def compressed_fp8(name: str, weight: torch.Tensor, strategy: str) -> Tensors:
    """A weight as compressed-tensors stores FP8: a bfloat16 scale of each row, or of all."""
    block = {"channel": (1, weight.shape[1]), "tensor": tuple(weight.shape), "block": (16, 8)}
    _, scale = _fp8(weight, block[strategy])
    scale = scale.bfloat16()
    rows, columns = block[strategy]
    wide = scale.float().repeat_interleave(rows, 0).repeat_interleave(columns, 1)
    wide = wide[: weight.shape[0], : weight.shape[1]]
    values = (weight.float() / wide).clamp(-LARGEST_FP8, LARGEST_FP8).to(torch.float8_e4m3fn)
    return {name: values, f"{name}_scale": scale.reshape(1) if strategy == "tensor" else scale}


def packed(name: str, weight: torch.Tensor, group: int, bits: int = 4) -> Tensors:
    """A weight as compressed-tensors packs whole numbers: words of 32 bits, bfloat16 scales."""
    rows, columns = weight.shape
    size, half = group or columns, 2 ** (bits - 1)
    grouped = weight.float().reshape(rows, -1, size)
    scale = (grouped.abs().amax(-1) / (half - 0.5)).bfloat16()
    numbers = (grouped / scale.float()[..., None]).round().clamp(-half, half - 1)
    unsigned = (numbers.reshape(rows, columns) + half).to(torch.int64)
    per_word = 32 // bits
    padded = torch.zeros(rows, -(-columns // per_word) * per_word, dtype=torch.int64)
    padded[:, :columns] = unsigned
    words = padded.reshape(rows, -1, per_word) << (bits * torch.arange(per_word))
    total = words.sum(-1)
    signed = torch.where(total >= 2**31, total - 2**32, total).to(torch.int32)
    return {
        f"{name}_packed": signed,
        f"{name}_scale": scale,
        f"{name}_shape": torch.tensor([rows, columns]),
    }


def mxfp4(name: str, weight: torch.Tensor) -> Tensors:
    """A weight (E, out, in) as gpt-oss stores it: 32 values of four bits and their exponent."""
    blocks = weight.float().reshape(*weight.shape[:-1], -1, 32)
    exponent = torch.floor(torch.log2(blocks.abs().amax(-1).clamp_min(1e-30))) - 2
    scaled = (blocks / torch.exp2(exponent)[..., None]).clamp(-6, 6)
    nearest = (scaled.abs()[..., None] - _FP4).abs().argmin(-1)
    codes = (nearest + 8 * (scaled < 0)).to(torch.uint8)
    return {
        f"{name}_blocks": codes[..., 0::2] | (codes[..., 1::2] << 4),
        f"{name}_scales": (exponent + 127).to(torch.uint8),
    }


@dataclass(frozen=True)
class Quantized:
    """A tiny checkpoint with quantized weights; a factory as those of tests/tiny.py."""

    plain: Any  # the factory of the same model in BF16
    scheme: str
    quantize: Callable[[str, torch.Tensor], Tensors] = field(compare=False)
    section: Mapping[str, Any] = field(compare=False)  # `quantization_config`
    # what is not quantized, as the published checkpoints leave it
    left: tuple[str, ...] = ("embed_tokens", "lm_head", "mlp.gate.", "norm", "eh_proj")

    def config(self) -> dict[str, Any]:
        return {**self.plain.config(), "quantization_config": dict(self.section)}

    def tensors(self) -> Tensors:
        found: Tensors = {}
        for name, tensor in self.plain.tensors().items():
            if tensor.ndim < 2 or any(part in name for part in self.left):
                found[name] = tensor
            else:
                found |= self.quantize(name, tensor)
        return found

    def write(self, folder: Path) -> Path:
        self.plain.write(folder)
        (folder / "config.json").write_text(json.dumps(self.config(), indent=2))
        save_sharded(self.tensors(), folder, getattr(self.plain, "n_shards", 1))
        return folder


def fp8_section(block: tuple[int, int] | None, *left: str) -> dict[str, Any]:
    """What Qwen3-FP8 and DeepSeek-V3 say of themselves."""
    return {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "modules_to_not_convert": [*left, "lm_head"],
        "weight_block_size": None if block is None else list(block),
    }


def compressed_section(form: str, **weights: Any) -> dict[str, Any]:
    """What checkpoints of llm-compressor say of themselves."""
    args = {"dynamic": False, "observer": "minmax", "symmetric": True, **weights}
    return {
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": args}},
        "format": form,
        "ignore": ["lm_head", "re:.*mlp.gate$"],
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }


def as_fp8(plain: Any, block: tuple[int, int] | None = (16, 16), *left: str) -> Quantized:
    """A checkpoint in FP8; `left` are modules that are not quantized."""
    return Quantized(
        plain,
        f"fp8 {block}",
        lambda name, weight: fp8(name, weight, block),
        fp8_section(block, *left),
        (*Quantized.left, *left),
    )


def as_compressed_fp8(plain: Any, strategy: str = "channel") -> Quantized:
    """A checkpoint in the FP8 of compressed-tensors, such as GLM-4.5-Air-FP8."""
    more = {"block_structure": [16, 8]} if strategy == "block" else {}
    return Quantized(
        plain,
        f"compressed fp8 {strategy}",
        lambda name, weight: compressed_fp8(name, weight, strategy),
        compressed_section("float-quantized", num_bits=8, type="float", strategy=strategy, **more),
    )


def as_packed(plain: Any, group: int = 32, bits: int = 4, only: str = "") -> Quantized:
    """A checkpoint in packed whole numbers; of Kimi-K2-Thinking, `only` the experts are."""
    how = {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}
    return Quantized(
        plain,
        f"int{bits} of {group}",
        lambda name, weight: packed(name, weight, group, bits) if only in name else {name: weight},
        compressed_section("pack-quantized", num_bits=bits, type="int", **how),
    )


def as_mxfp4(plain: Any, experts: str = "experts.") -> Quantized:
    """A checkpoint whose fused experts (E, in, out) are MXFP4, and nothing else."""

    def quantize(name: str, weight: torch.Tensor) -> Tensors:
        if experts not in name or name.endswith("_bias"):
            return {name: weight}
        return mxfp4(name, weight.transpose(1, 2).contiguous())

    return Quantized(plain, "mxfp4", quantize, {"quant_method": "mxfp4"})
