"""Sums of importance matrices."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader

import reap2gguf
from reap2gguf.errors import ArtifactError, UsageError
from reap2gguf.gguf_files.imatrix import Imatrix, ImatrixEntry, load_imatrix, save_both
from reap2gguf.gguf_files.imatrix_merge import merge
from reap2gguf.observing.importance import ImportanceObserver
from tests.observing.sweeps import rows_of, run_sweep
from tests.tiny import TinyQwen3Moe


def entry(name: str, counts: list[int], sums: list[list[float]]) -> ImatrixEntry:
    return ImatrixEntry(name, np.array(sums, dtype=np.float32), np.array(counts))


def matrix(*entries: ImatrixEntry, text: str = "a.txt", n: int = 3, size: int = 8) -> Imatrix:
    return Imatrix({one.name: one for one in entries}, text, n, size)


ONE = matrix(entry("x", [2, 0], [[1, 2], [0, 0]]), entry("y", [5], [[1, 1]]))
TWO = matrix(entry("x", [1, 3], [[4, 8], [3, 6]]), text="b.txt", n=2)


def test_sums_and_counts_are_added(tmp_path: Path) -> None:
    found = merge([("one", ONE), ("two", TWO)])
    x, y = (found.imatrix.entries[name] for name in "xy")
    np.testing.assert_array_equal(x.sums, [[5, 10], [3, 6]])
    assert x.counts.tolist() == [3, 3]
    np.testing.assert_array_equal(y.sums, [[1, 1]])
    assert found.lacking == (("two", ("y",)),)
    made = found.imatrix
    assert (made.datasets, made.n_chunks, made.chunk_size) == (("a.txt", "b.txt"), 5, 8)
    save_both(made, tmp_path / "both.gguf")
    again = load_imatrix(tmp_path / "both.gguf")
    assert again.datasets == ("a.txt", "b.txt")
    assert reap2gguf.imatrix_statistics(again).dataset == "a.txt, b.txt"
    names = GGUFReader(tmp_path / "both.gguf").fields["imatrix.datasets"].contents()
    assert names == ["a.txt", "b.txt"]
    assert load_imatrix(tmp_path / "both.dat").datasets == ("a.txt",)


def test_it_is_what_one_pass_over_both_texts_finds(tmp_path: Path) -> None:
    folder = TinyQwen3Moe().write(tmp_path / "model")
    rows = rows_of(40, 32, 19)
    parts = (rows[:1], rows[1:])
    made = [Imatrix(run_sweep(ImportanceObserver, folder, p)[0].entries, "", 1, 8) for p in parts]
    whole, _ = run_sweep(ImportanceObserver, folder, rows)
    found = merge([("one", made[0]), ("two", made[1])]).imatrix
    assert found.entries.keys() == whole.entries.keys()
    for name, one in found.entries.items():
        expected = whole.entries[name]
        np.testing.assert_array_equal(one.counts, expected.counts, err_msg=name)
        np.testing.assert_allclose(one.sums, expected.sums, rtol=1e-5, atol=1e-6, err_msg=name)


def test_chunks_of_other_sizes_and_texts_named_twice() -> None:
    other = replace(TWO, chunk_size=20, dataset="a.txt")
    found = merge([("one", ONE), ("two", other), ("three", replace(ONE, dataset=""))]).imatrix
    assert found.datasets == ("a.txt",)
    assert (found.chunk_size, found.n_chunks) == (8, 11)  # 24 + 40 + 24 tokens


def test_what_cannot_be_added_is_refused(tmp_path: Path) -> None:
    other = matrix(entry("x", [1], [[1, 2]]))
    with pytest.raises(ArtifactError, match="two: x has 1 x 2 values, and 2 x 2 in one; they are"):
        merge([("one", ONE), ("two", other)])
    older = matrix(entry("x", [1, 1], [[1, 2], [1, 2]]), size=0)
    for given in ([("new", ONE), ("old", older)], [("old", older), ("new", ONE)]):
        with pytest.raises(ArtifactError, match=r"old: counts calls, as \.dat files do, and new"):
            merge(given)
    assert merge([("old", older), ("old 2", older)]).imatrix.chunk_size == 0
    huge = matrix(entry("y", [5], [[3e38, 1]]))
    with pytest.raises(ArtifactError, match="two: y: the sum with one is too large for a file"):
        merge([("one", huge), ("two", huge)])
    path = tmp_path / "one.gguf"
    save_both(ONE, path)
    with pytest.raises(UsageError, match="expected two or more"):
        reap2gguf.merge_imatrices([path])
    with pytest.raises(UsageError, match="expected two or more"):
        reap2gguf.merge_imatrices(str(path))
    with pytest.raises(UsageError, match="is given twice"):
        reap2gguf.merge_imatrices([path, str(path)])
    save_both(TWO, tmp_path / "two.gguf")
    with pytest.raises(UsageError, match="would replace the input"):
        reap2gguf.merge_imatrices([path, tmp_path / "two.gguf"], path)
    merged = reap2gguf.merge_imatrices([path, TWO], tmp_path / "sum.gguf")
    assert merged.lacking == (("imatrix 2", ("y",)),)
    assert load_imatrix(tmp_path / "sum.gguf").entries["x"].counts.tolist() == [3, 3]
