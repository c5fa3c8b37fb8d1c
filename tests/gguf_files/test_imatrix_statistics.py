"""The statistics of an importance matrix, by group of tensors."""

from __future__ import annotations

import numpy as np

from reap2gguf.gguf_files.imatrix import Imatrix, ImatrixEntry
from reap2gguf.gguf_files.imatrix_statistics import TensorGroup, inspect_imatrix


def entry(name: str, counts: list[int], sums: list[list[float]]) -> ImatrixEntry:
    return ImatrixEntry(name, np.array(sums, dtype=np.float32), np.array(counts))


def matrix(*entries: ImatrixEntry) -> Imatrix:
    return Imatrix({one.name: one for one in entries}, "text.txt", 3, 8)


def test_groups_and_experts() -> None:
    found = inspect_imatrix(
        matrix(
            entry("blk.0.ffn_down_exps.weight", [4, 0], [[8, 0], [0, 0]]),
            entry("blk.10.ffn_down_exps.weight", [2, 6], [[2, 2], [6, 18]]),
            entry("output.weight", [12], [[3, 9, 0, 12]]),
        )
    )
    experts, output = found.groups
    # 36 in all, over 12 tokens of 2 columns; 5 of 8 columns are not zero
    assert experts == TensorGroup("blk.*.ffn_down_exps.weight", 2, 4, 1, 0, 3, 1.5, 0.625)
    assert output == TensorGroup("output.weight", 1, 1, 0, 12, 12, 0.5, 0.75)
    assert (found.n_experts, found.n_unseen_experts) == (4, 1)
    assert (found.dataset, found.n_chunks, found.chunk_size) == ("text.txt", 3, 8)


def test_a_matrix_that_saw_nothing() -> None:
    (group,) = inspect_imatrix(matrix(entry("blk.0.x.weight", [0], [[0, 0]]))).groups
    assert group.mean_square == 0
    assert group.active == 0


def test_a_format_that_counts_no_experts() -> None:
    found = inspect_imatrix(matrix(entry("blk.0.ffn_down_exps.weight", [5], [[1, 2, 3, 4]])))
    assert found.n_experts == 0
