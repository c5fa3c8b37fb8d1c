"""Ranges of rows, against the transforms applied to all that is stored."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.gguf_files import rows
from reap2gguf.gguf_files.rows import expect_rows, read_rows, row_ranges
from reap2gguf.models.description import GgufTensor
from reap2gguf.models.table import describe
from tests.families.qwen3_next import NEXT
from tests.tiny import TinyQwen35Moe

TINY = {"packed": NEXT, "tiled": TinyQwen35Moe(value_heads=12, nested=False)}


@pytest.fixture(params=TINY)
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    with Checkpoint.open(TINY[request.param].write(tmp_path / "model")) as found:
        yield found


def transformed(checkpoint: Checkpoint) -> list[GgufTensor]:
    made = describe(checkpoint).gguf_tensors(checkpoint.tensors)
    return [tensor for tensor in made if tensor.transform is not None]


def picks(tensor: GgufTensor) -> bool:
    return any(name in tensor.name for name in ("attn_qkv", "attn_gate", "_alpha", "_beta"))


def test_ranges_are_the_whole(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "MAX_VALUES", 700)  # 7 or 10 rows, which fit no head
    n_cut = 0
    for tensor in transformed(checkpoint):
        (slab,) = tensor.slabs
        assert tensor.transform is not None
        expected = tensor.transform(checkpoint.read_float32(slab.stored)).reshape(tensor.shape)
        ranges = list(row_ranges(tensor))
        n_cut += len(ranges) > 1
        assert (len(ranges) > 1) is picks(tensor)
        found = [read_rows(checkpoint, tensor, slab, first, last) for first, last in ranges]
        np.testing.assert_array_equal(np.concatenate(found).reshape(tensor.shape), expected)
    assert n_cut >= 6


def test_only_the_rows_of_a_range_are_read(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: dict[str, list[int]] = {"read": [], "expected": []}
    read, expect = checkpoint.read_float32, checkpoint.expect

    def reading(name: str, first: int, last: int, index: int | None) -> Any:
        taken["read"] += range(first, last)
        return read(name, first, last, index)

    def expecting(name: str, first: int, last: int, index: int | None) -> None:
        taken["expected"] += range(first, last)
        expect(name, first, last, index)

    monkeypatch.setattr(checkpoint, "read_float32", reading)
    monkeypatch.setattr(checkpoint, "expect", expecting)
    for tensor in filter(picks, transformed(checkpoint)):
        (slab,) = tensor.slabs
        taken.update(read=[], expected=[])
        expect_rows(checkpoint, tensor, slab, 3, 9)
        assert read_rows(checkpoint, tensor, slab, 3, 9).shape == (6, tensor.n_columns)
        assert len(set(taken["read"])) == 6
        assert taken["read"] == taken["expected"]


def test_rows_are_counted_from_the_slabs_first(checkpoint: Checkpoint) -> None:
    tensor = next(filter(picks, transformed(checkpoint)))
    assert tensor.transform is not None
    first = replace(tensor.slabs[0], rows=(0, 5))
    moved = replace(tensor.slabs[0], rows=(2, 7))
    places = tensor.transform.rows
    assert places is not None
    stored = checkpoint.read_float32(first.stored)
    for slab, shift in ((first, 0), (moved, 2)):
        found = read_rows(checkpoint, tensor, slab, 1, 4)
        np.testing.assert_array_equal(found, stored[places[1:4] + shift])
