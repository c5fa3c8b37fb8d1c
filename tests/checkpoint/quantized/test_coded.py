"""Any range of bytes of a decoded weight is that part of all of it."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.checkpoint.quantized import coded
from reap2gguf.checkpoint.quantized.coded import pairs_table, to_bfloat16
from tests.families.qwen_vl import TinyQwen3Vl
from tests.quantized import (
    as_compressed_fp8,
    as_fp8,
    as_mxfp4,
    as_packed,
    compressed_section,
    fp8_section,
)
from tests.tiny import TinyQwen3Moe, save_sharded

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


LARGE: dict[str, tuple[dict[str, Any], dict[str, torch.Tensor]]] = {
    "fp8": (
        fp8_section((128, 128)),
        {
            "a.weight": torch.zeros(2048, 4096).to(torch.float8_e4m3fn),
            "a.weight_scale_inv": torch.ones(16, 32),
        },
    ),
    "int4": (
        compressed_section("pack-quantized", num_bits=4, strategy="group", group_size=32),
        {
            "a.weight_packed": torch.zeros(2048, 512).int(),
            "a.weight_scale": torch.ones(2048, 128).bfloat16(),
            "a.weight_shape": torch.tensor([2048, 4096]),
        },
    ),
    "mxfp4": (
        {"quant_method": "mxfp4"},
        {
            "a_blocks": torch.zeros(4, 1024, 64, 16, dtype=torch.uint8),
            "a_scales": torch.full((4, 1024, 64), 120, dtype=torch.uint8),
        },
    ),
}


@pytest.mark.parametrize("name", LARGE)
def test_memory(name: str, tmp_path: Path) -> None:
    """Eight million values, of which one million are decoded at a time."""
    section, tensors = LARGE[name]
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": section}))
    save_sharded(tensors, tmp_path, 1)
    with Checkpoint.open(tmp_path) as opened:
        for weights in (opened, opened.dequantized()):
            ((weight, tensor),) = weights.tensors.items()
            assert tensor.n_elements == 2**23
            buffer = np.empty(tensor.n_bytes, np.uint8)
            tracemalloc.start()
            weights.read_bytes(weight, 0, buffer)
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            assert peak < 24 * 2**20


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
