"""A quantized checkpoint is read as if it was not quantized, and as it is stored."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.models.table import describe
from tests.quantized import Quantized, as_compressed_fp8, as_fp8, as_packed
from tests.tiny import TinyQwen3Moe

CASES = [
    as_fp8(TinyQwen3Moe(n_shards=3)),
    as_packed(TinyQwen3Moe()),
    as_compressed_fp8(TinyQwen3Moe()),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.scheme)
def test_both_sides(case: Quantized, tmp_path: Path) -> None:
    plain, stored = case.plain.tensors(), case.tensors()
    with Checkpoint.open(case.write(tmp_path / "m")) as opened:
        assert {n: t.shape for n, t in opened.tensors.items()} == {
            name: tuple(tensor.shape) for name, tensor in plain.items()
        }
        assert opened.stored.tensors.keys() == stored.keys()
        assert opened.config == case.plain.config()
        assert opened.stored.config == case.config()
        parts = [part for name in opened.tensors for part in opened.parts(name)]
        assert sorted(parts) == sorted(stored)
        for name in opened.tensors:
            assert all(opened.weight_name(part) == name for part in opened.parts(name))
            assert opened.stored_bytes(name) == sum(
                stored[part].nbytes for part in opened.parts(name)
            )
        assert opened.n_bytes == sum(tensor.nbytes for tensor in stored.values())
        assert opened.n_parameters == sum(tensor.numel() for tensor in plain.values())
        assert describe(opened).caveats() == ()
        for name, tensor in stored.items():
            raw = opened.stored.read(name).reshape(-1).view(np.uint8)
            assert (
                raw.tobytes() == tensor.contiguous().flatten().view(dtype=_byte()).numpy().tobytes()
            )


def _byte() -> object:
    import torch

    return torch.uint8


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.scheme)
def test_dequantized(case: Quantized, tmp_path: Path) -> None:
    """As a checkpoint in BF16 that holds the rounded values."""
    with Checkpoint.open(case.write(tmp_path / "m")) as opened:
        rounded = opened.dequantized()
        assert rounded.stored is rounded
        assert {one.dtype for one in rounded.tensors.values()} == {"BF16"}
        assert rounded.config == case.plain.config()
        assert rounded.n_bytes == 2 * rounded.n_parameters == 2 * opened.n_parameters
        assert rounded.fingerprint() == opened.fingerprint()
        for name in rounded.tensors:
            assert rounded.parts(name) == (name,)
            assert rounded.kind(name) == "BF16"
            values, exact = rounded.read_float32(name), opened.read_float32(name)
            # at most half a step of seven bits, of values that are not subnormal
            assert (np.abs(values - exact) <= np.abs(exact) * 2.0**-8).all()


def test_a_checkpoint_in_bf16_is_its_own(tmp_path: Path) -> None:
    with Checkpoint.open(TinyQwen3Moe().write(tmp_path / "m")) as opened:
        assert opened.stored is opened
        assert opened.dequantized() is opened
        assert opened.decoding is None


def test_a_leftover_key_decodes_nothing(tmp_path: Path) -> None:
    folder = TinyQwen3Moe().write(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "fp8"}})
    )
    with Checkpoint.open(folder) as opened:
        assert opened.decoding is None
        assert any("leftover quantization_config" in line for line in describe(opened).caveats())
