"""Records of candidates from scores, against their definitions and repeated samples."""

from __future__ import annotations

import numpy as np
import pytest

from reap2gguf.choosing.figures import choice_of_scores, difference
from reap2gguf.choosing.texts import MeasuredText
from reap2gguf.errors import EvaluationError
from reap2gguf.evaluating.scores import ScoredRow, Scores, VariantScores

ROWS = [ScoredRow(np.arange(length), first) for length, first in ((8, 4), (6, 3), (8, 4), (9, 5))]
HELD, OTHER = MeasuredText("held", ROWS[:2]), MeasuredText("other", ROWS[2:])


def scores_of(apart: dict[str, float], seed: int = 0) -> Scores:
    """Scores whose divergences are about these numbers."""
    draw = np.random.default_rng(seed)
    n_scored = sum(row.n_scored for row in ROWS)
    top = np.zeros(n_scored, np.int64)
    names = ["source", *apart]
    variants = {name: VariantScores(draw.gamma(2, 1, n_scored), top) for name in names}
    divergences = {
        ("source", name): mean * draw.uniform(0.9, 1.1, n_scored) for name, mean in apart.items()
    }
    return Scores(ROWS, variants, divergences)


def test_records_hold_what_was_scored_on_each_text() -> None:
    scores = scores_of({"a": 0.5, "b": 0.2})
    same = {"a": "a", "b": "b", "c": "a"}
    found = choice_of_scores(scores, same, HELD, OTHER)
    assert found.chosen == "b"
    assert [one.name for one in found.candidates] == ["a", "b", "c"]
    assert [one.same_as for one in found.candidates] == [None, None, "a"]
    n_held = sum(row.n_scored for row in HELD.rows)
    apart = scores.divergences["source", "a"]
    record = found.candidate("a")
    assert record.held_out.divergence.value == pytest.approx(apart[:n_held].mean())
    assert record.other is not None
    assert record.other.divergence.value == pytest.approx(apart[n_held:].mean())
    nll = scores.variants["a"].nll
    assert record.held_out.perplexity.value == pytest.approx(np.exp(nll[:n_held].mean()))
    behind = (apart - scores.divergences["source", "b"])[:n_held].mean()
    assert record.held_out.behind.value == pytest.approx(behind)
    assert found.candidate("b").held_out.behind.value == 0
    assert found.candidate("b").held_out.behind.error == 0
    assert found.held_out.n_scored + (found.other.n_scored if found.other else 0) == len(apart)
    assert found.held_out.n_tokens == 14


def test_without_another_text_only_held_out_rows_count() -> None:
    scores = scores_of({"a": 0.5, "b": 0.2}).part(0, 2)
    found = choice_of_scores(scores, {"a": "a", "b": "b"}, HELD, None)
    assert (found.chosen, found.other) == ("b", None)
    assert found.candidate("a").other is None


def test_the_error_of_a_difference_is_the_spread_of_repeated_samples() -> None:
    """Of rows whose tokens resemble each other, where tokens do not count as independent."""
    draw = np.random.default_rng(1)
    spans = [slice(50 * number, 50 * number + 50) for number in range(40)]
    values, errors = [], []
    for _ in range(300):
        of_row = np.repeat(draw.normal(0.1, 0.3, 40), 50)
        one, other = of_row + draw.normal(0, 0.1, 2000), draw.normal(0, 0.1, 2000)
        found = difference(one, other, spans)
        values.append(found.value)
        errors.append(found.error)
    assert np.mean(values) == pytest.approx(0.1, abs=0.01)
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.1)


def test_a_broken_candidate_is_named() -> None:
    scores = scores_of({"a": 0.5})
    scores.variants["a"].nll[:] = 1e4
    with pytest.raises(EvaluationError, match=r"a: its perplexity is beyond .* --candidates"):
        choice_of_scores(scores, {"a": "a"}, HELD, OTHER)
