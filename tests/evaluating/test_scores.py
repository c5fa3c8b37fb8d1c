"""Scored tokens by rows, and by pairs of variants."""

from __future__ import annotations

import numpy as np
import pytest

from reap2gguf.evaluating.scores import ScoredRow, Scores, VariantScores


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
