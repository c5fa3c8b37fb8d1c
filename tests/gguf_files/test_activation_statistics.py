"""The figures of `llama-imatrix --show-statistics`: llama.cpp's own, and by hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from reap2gguf.gguf_files.activation_statistics import (
    ImatrixStatistics,
    imatrix_statistics,
    tensor_kind,
)
from reap2gguf.gguf_files.imatrix import Imatrix, ImatrixEntry, load_imatrix, save_dat
from tests.tiny import REPOSITORY

DATA = REPOSITORY / "tests" / "data"
FILE = DATA / "tiny-qwen3-moe.imatrix.gguf"
# printed by llama.cpp's compute_statistics, compute_cossim and show_statistics of the same file
PRINTED = (DATA / "tiny-qwen3-moe.imatrix-statistics.txt").read_text().splitlines()


def entry(name: str, counts: list[int], sums: list[list[float]]) -> ImatrixEntry:
    return ImatrixEntry(name, np.array(sums, dtype=np.float32), np.array(counts))


def of(*entries: ImatrixEntry, below: int = 5) -> ImatrixStatistics:
    matrix = Imatrix({one.name: one for one in entries}, "text.txt", 3, 8)
    return imatrix_statistics(matrix, below)


def numbers(line: str) -> list[float]:
    return [float(word.rstrip("%")) for word in line.split()]


def test_the_figures_are_those_of_llama_cpp() -> None:
    found = imatrix_statistics(load_imatrix(FILE), 100)
    lines = [line for line in PRINTED if "\t" in line and line.lstrip()[0].isdigit()]
    assert len(found.tensors) == 32
    for line, one in zip(lines[:32], found.tensors, strict=True):
        words = line.split()
        assert (int(words[0]), words[1]) == (one.layer, tensor_kind(one.name))
        total, least, most, mean, deviation, active, size, bits, share, z, cosine = numbers(
            " ".join(words[2:])
        )
        assert (one.total, one.n_values) == (pytest.approx(total, rel=2e-6, abs=0.006), size)
        assert (one.smallest, one.largest) == pytest.approx((least, most), abs=6e-5)
        assert (one.mean, one.deviation) == pytest.approx((mean, deviation), abs=0.006)
        shares = (100 * one.active, 100 * one.entropy_share, 100 * one.z_density)
        assert shares == pytest.approx((active, share, z), abs=0.006)
        assert (one.entropy, one.cosine) == pytest.approx((bits, cosine), abs=6e-5)
    assert len(lines[32:]) == len(found.layers) == 4
    for line, layer in zip(lines[32:], found.layers, strict=True):
        number, total, z, cosine = numbers(line)
        assert layer.layer == number
        assert layer.total == pytest.approx(total, abs=0.006)
        assert (100 * layer.z_density, layer.cosine) == pytest.approx((z, cosine), abs=6e-5)


def test_by_hand() -> None:
    (one,) = of(entry("blk.0.attn_q.weight", [2], [[2, 2, 4, 8]])).tensors
    # mean squares 1, 1, 2, 4: total 8, mean 2, variance 22/4 - 4 = 1.5
    assert (one.total, one.mean, one.smallest, one.largest, one.n_values) == (8, 2, 1, 4, 4)
    assert one.deviation == pytest.approx(math.sqrt(1.5))
    # shares 1/8, 1/8, 1/4, 1/2: 3/8 + 3/8 + 2/4 + 1/2 bits of at most 2
    assert (one.entropy, one.entropy_share) == pytest.approx((1.75, 0.875))
    assert (one.active, one.z_density, one.cosine) == (1, 0.25, 0)  # 4 alone is above 3.22


def test_the_cosine_is_of_sums_with_the_block_before() -> None:
    found = of(
        entry("blk.0.x.weight", [1], [[3, 4]]),
        entry("blk.1.x.weight", [9], [[4, 3]]),
        entry("blk.3.x.weight", [1], [[4, 3]]),
        entry("blk.4.x.weight", [1], [[4, 3, 1]]),
        entry("output.weight", [1], [[1, 1]]),
    )
    cosines = {one.name: one.cosine for one in found.tensors}
    assert cosines.pop("blk.1.x.weight") == pytest.approx(24 / 25)
    assert set(cosines.values()) == {0.0}
    assert [one.layer for one in found.layers] == [0, 1, 3, 4]


def test_experts_without_tokens_are_left_out_and_counted() -> None:
    found = of(
        entry("blk.0.ffn_up_exps.weight", [4, 0, 10, 5], [[4, 8], [0, 0], [10, 30], [0, 0]]),
        entry("blk.1.ffn_up_exps.weight", [0, 0], [[0, 0], [0, 0]]),
    )
    (one,) = found.tensors
    assert (one.n_values, one.total, one.active) == (6, 1 + 2 + 1 + 3, 4 / 6)
    assert found.empty == ("blk.1.ffn_up_exps.weight",)
    first, second = found.experts
    assert first.hits == (4, 0, 10, 5)
    assert (first.n_unseen, first.n_below, first.share_below) == (1, 2, 0.5)
    assert (first.fewest, first.median) == (0, 4)
    assert (second.layer, second.n_unseen, second.share_below) == (1, 2, 1)


def test_equal_and_single_values() -> None:
    (one,) = of(entry("blk.0.x.weight", [1], [[0.1, 0.1, 0.1]])).tensors
    assert (one.deviation, one.z_density) == (0, 0)
    assert one.entropy_share == pytest.approx(1)
    (zeros,) = of(entry("blk.0.x.weight", [1], [[0, 0]])).tensors
    assert (zeros.active, zeros.entropy, zeros.entropy_share) == (0, 0, 0)
    (single,) = of(entry("blk.0.x.weight", [1], [[2]])).tensors
    assert (single.n_values, single.entropy_share) == (1, 0)


def test_the_older_format_has_the_same_figures_and_no_hits(tmp_path: Path) -> None:
    path = tmp_path / "m.dat"
    save_dat(load_imatrix(FILE), path)
    older, newer = (imatrix_statistics(load_imatrix(one), 100) for one in (path, FILE))
    assert not older.experts
    assert len(older.uncounted) == 12
    by_name = {one.name: one for one in older.tensors}
    for one in newer.tensors:
        same = by_name[one.name]
        if "blk.1.ffn_" in one.name and "exps" in one.name:  # ones stand for an unseen expert
            assert same.n_values == 4096
        else:
            assert same.total == pytest.approx(one.total, rel=1e-5)
            assert same.entropy == pytest.approx(one.entropy, rel=1e-5)
