"""FP8 decodes to what transformers and compressed-tensors decode it to, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.naive_quantized.base import NaiveQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.checkpoint.quantized.float8 import MEANINGS
from reap2gguf.checkpoint.weights import Weights
from reap2gguf.errors import CheckpointError
from tests.quantized import Quantized, as_compressed_fp8, as_fp8
from tests.tiny import TinyQwen3Moe, save_sharded


def bits(weights: Weights, name: str) -> torch.Tensor:
    """A tensor as bfloat16."""
    return torch.from_numpy(weights.read(name).view(np.int16).copy()).view(torch.bfloat16)


def test_every_byte() -> None:
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    np.testing.assert_array_equal(MEANINGS, every)
    np.testing.assert_array_equal(np.signbit(MEANINGS), np.signbit(every))


@pytest.mark.parametrize(
    "case",
    [
        as_fp8(TinyQwen3Moe(), (16, 16)),
        as_fp8(TinyQwen3Moe(), (8, 32)),
        as_fp8(TinyQwen3Moe(fused=True), (32, 16)),
        as_fp8(TinyQwen3Moe(), (1, 16)),
        as_fp8(TinyQwen3Moe(), None),
    ],
    ids=lambda case: case.scheme,
)
def test_blocks(case: Quantized, tmp_path: Path) -> None:
    stored, theirs = case.tensors(), Fp8Dequantize(None)
    with Checkpoint.open(case.write(tmp_path / "m")) as opened:
        rounded, n_decoded = opened.dequantized(), 0
        for name in opened.tensors:
            if f"{name}_scale_inv" not in stored:
                assert name in stored
                continue
            given = stored[name], stored[f"{name}_scale_inv"]
            expected = theirs._dequantize_one(*given, output_dtype=torch.float32).numpy()
            np.testing.assert_array_equal(opened.read_float32(name), expected)
            as_bfloat16 = theirs._dequantize_one(*given, output_dtype=torch.bfloat16)
            assert torch.equal(bits(rounded, name), as_bfloat16)
            n_decoded += 1
        assert n_decoded > 10


def test_blocks_with_ragged_edges(tmp_path: Path) -> None:
    """transformers refuses those, which DeepSeek-V3 has; the definition is one product."""
    case = as_fp8(TinyQwen3Moe(), (24, 40))
    stored = case.tensors()
    with Checkpoint.open(case.write(tmp_path / "m")) as opened:
        for name, scale in stored.items():
            if not name.endswith("_scale_inv"):
                continue
            weight = stored[name.removesuffix("_scale_inv")]
            row, column = torch.meshgrid(*map(torch.arange, weight.shape), indexing="ij")
            expected = weight.float() * scale[row // 24, column // 40]
            found = opened.read_float32(name.removesuffix("_scale_inv"))
            np.testing.assert_array_equal(found, expected.numpy())


@pytest.mark.parametrize("strategy", ["channel", "tensor", "block"])
def test_compressed_tensors(strategy: str, tmp_path: Path) -> None:
    case = as_compressed_fp8(TinyQwen3Moe(), strategy)
    more: dict[str, Any] = {"block_structure": [16, 8]} if strategy == "block" else {}
    args = QuantizationArgs(num_bits=8, type="float", strategy=strategy, **more)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    stored = case.tensors()
    with Checkpoint.open(case.write(tmp_path / "m")) as opened:
        rounded, scales = opened.dequantized(), [n for n in stored if n.endswith("_scale")]
        assert len(scales) > 10
        for name in (scale.removesuffix("_scale") for scale in scales):
            state = {"weight": stored[name], "weight_scale": stored[f"{name}_scale"]}
            theirs = NaiveQuantizationCompressor.decompress(state, scheme)["weight"]
            assert theirs.dtype == torch.bfloat16
            assert torch.equal(bits(rounded, name), theirs)
            exact = stored[name].double() * _spread(stored, name).double()
            np.testing.assert_array_equal(opened.read_float32(name), exact.float().numpy())


def _spread(stored: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """The scale of every value."""
    scale, (rows, columns) = stored[f"{name}_scale"], stored[name].shape
    if scale.ndim == 1:
        return scale.expand(rows, columns)
    height, width = -(-rows // scale.shape[0]), -(-columns // scale.shape[1])
    wide = scale.repeat_interleave(height, 0).repeat_interleave(width, 1)
    return wide[:rows, :columns]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_scales_that_are_not_finite(bad: float, tmp_path: Path) -> None:
    case = as_fp8(TinyQwen3Moe())
    folder, name = case.write(tmp_path / "m"), "model.layers.1.self_attn.v_proj.weight"
    tensors = case.tensors()
    tensors[f"{name}_scale_inv"][1, 0] = bad
    save_sharded(tensors, folder, 1)
    with Checkpoint.open(folder) as opened:
        opened.read_float32(name, 0, 16)  # rows of other blocks
        with pytest.raises(
            CheckpointError, match=r"v_proj.weight_scale_inv' holds NaN or infinite"
        ):
            opened.read_float32(name)
