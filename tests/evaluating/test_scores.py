"""Scored tokens by rows, and by pairs of variants."""

from __future__ import annotations

import numpy as np
import pytest

from reap2gguf.evaluating.scores import ScoredRow, Scores, VariantScores, joined


def scores() -> Scores:
    rows = [ScoredRow(np.arange(5), 3), ScoredRow(np.arange(4), 4), ScoredRow(np.arange(3), 1)]
    one = VariantScores(np.array([1.0, 2.0, 3.0, 4.0]), np.array([3, 4, 1, 2]))
    other = VariantScores(np.array([1.0, 2.5, 3.0, 3.5]), np.array([3, 0, 1, 9]))
    kl = np.array([0.0, 0.1, 0.2, 0.3])
    return Scores(rows, {"source": one, "pruned": other}, {("source", "pruned"): kl})


def test_every_row_has_its_own_tokens() -> None:
    assert scores().spans() == [slice(0, 2), slice(2, 2), slice(2, 4)]


def test_a_pair_has_both_variants() -> None:
    pair = scores().pair("source", "pruned")
    assert pair.same_top.tolist() == [True, False, True, False]
    assert pair.reference_nll.tolist() == [1.0, 2.0, 3.0, 4.0]
    assert pair.other_nll.tolist() == [1.0, 2.5, 3.0, 3.5]
    with pytest.raises(KeyError):
        scores().pair("pruned", "source")


def test_a_part_has_its_own_rows() -> None:
    part = scores().part(1, 3)
    assert [len(row.tokens) for row in part.rows] == [4, 3]
    assert part.variants["source"].nll.tolist() == [3.0, 4.0]
    assert part.variants["pruned"].top.tolist() == [1, 9]
    assert part.divergences["source", "pruned"].tolist() == [0.2, 0.3]


def answers(*last: int, first: int = 3, start: int = 7) -> list[ScoredRow]:
    return [ScoredRow(np.array([start, 8, 9, token]), first) for token in last]


def test_answers_of_one_token_become_one_row() -> None:
    longer = ScoredRow(np.arange(6), 4)
    rows = [*answers(1, 2, 3), *answers(4, 5, start=6), longer]
    found = joined(rows)
    assert [row.n_scored for row in found] == [3, 2, 2]
    assert [row.right.tolist() for row in found] == [[1, 2, 3], [4, 5], [4, 5]]
    assert [row.positions.tolist() for row in found] == [[2, 2, 2], [2, 2], [3, 4]]
    apart = [one for row in found for one in row.apart()]
    assert [one.tokens.tolist() for one in apart] == [row.tokens.tolist() for row in rows]
    assert [one.first for one in apart] == [row.first for row in rows]
    assert sum(len(row.tokens) for row in found) == 4 + 4 + 6


@pytest.mark.parametrize(
    "rows",
    [
        answers(1, 2, first=2),
        [*answers(1), *answers(2, start=6)],
        [*answers(1), ScoredRow(np.array([7, 8, 9, 9, 2]), 4)],
        [*answers(1), ScoredRow(np.array([7, 8, 9, 2]), 3, is_compared=False)],
    ],
)
def test_other_rows_stay_as_they_are(rows: list[ScoredRow]) -> None:
    assert joined(rows) == rows
