"""Any range of bytes of a decoded weight is that part of all of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.checkpoint.quantized import coded
from reap2gguf.checkpoint.quantized.coded import pairs_table, to_bfloat16
from tests.families.qwen_vl import TinyQwen3Vl
from tests.quantized import as_compressed_fp8, as_fp8, as_mxfp4, as_packed
from tests.tiny import TinyQwen3Moe

CASES = [
    as_fp8(TinyQwen3Moe(), (24, 20)),
    as_fp8(TinyQwen3Moe(fused=True), (16, 64)),
    as_compressed_fp8(TinyQwen3Moe(), "channel"),
    as_packed(TinyQwen3Moe()),
    as_mxfp4(TinyQwen3Vl(hidden=64, width=96)),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.scheme)
@pytest.mark.parametrize("dequantized", [False, True])
@pytest.mark.parametrize("n_values", [7, 2**20])
def test_ranges(
    case: object, dequantized: bool, n_values: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = np.random.default_rng(1)
    with Checkpoint.open(case.write(tmp_path / "m")) as opened:  # type: ignore[attr-defined]
        weights = opened.dequantized() if dequantized else opened
        assert opened.decoding is not None
        for name in list(opened.decoding.weights)[:12]:
            n_bytes = weights.tensors[name].n_bytes
            whole = weights.read(name).reshape(-1).view(np.uint8)
            monkeypatch.setattr(coded, "_VALUES", n_values)
            for _ in range(4):
                first, last = sorted(generator.integers(0, n_bytes + 1, 2).tolist())
                part = np.empty(last - first, np.uint8)
                weights.expect_bytes(name, first, last - first)
                weights.read_bytes(name, first, part)
                np.testing.assert_array_equal(part, whole[first:last])
            monkeypatch.undo()


def test_bfloat16() -> None:
    bits = np.random.default_rng(0).integers(0, 2**32, 200_000, dtype=np.uint32)
    ties = np.arange(0x3F800000, 0x3F800000 + 2**18, 2**15, dtype=np.uint32)
    ends = np.array([0, 0x80000000, 0x7F7FFFFF, 0x7F800000, 0xFF800000, 1], np.uint32)
    values = np.concatenate([bits, ties, ends]).view(np.float32)
    expected = torch.from_numpy(values).bfloat16().view(torch.int16).numpy().view(np.uint16)
    found, is_nan = to_bfloat16(values), np.isnan(values)
    np.testing.assert_array_equal(found[~is_nan], expected[~is_nan])
    assert np.isnan((found[is_nan].astype(np.uint32) << 16).view(np.float32)).all()


def test_pairs() -> None:
    table = pairs_table(np.arange(16, dtype=np.float32)).view(np.float32).reshape(256, 2)
    assert table[0xA3].tolist() == [3, 10]
