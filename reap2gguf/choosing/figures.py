"""From what candidates predict at every scored token to their records and the choice.

Letters: S scored tokens of a text, R rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from reap2gguf.bundle.choice import CandidateRecord, ChoiceRecord, ChoiceText, Figures
from reap2gguf.bundle.evaluation import Estimate
from reap2gguf.choosing.rule import best
from reap2gguf.errors import EvaluationError
from reap2gguf.evaluating.figures import Doubles, mean_of, perplexity

if TYPE_CHECKING:
    from reap2gguf.choosing.texts import MeasuredText
    from reap2gguf.evaluating.scores import Scores

SOURCE = "source"


def difference(one: Doubles, other: Doubles, spans: Sequence[slice]) -> Estimate:
    """Mean of `one` - `other`, arrays (S,), and its standard error from the sums of whole rows.

    With d the mean and e_r the sum of (one - other - d) over the tokens of row r, the error is
    sqrt(R / (R - 1) sum_r e_r^2) / S: that of a ratio of sums. At least two rows.
    """
    change = one - other
    mean = float(change.mean())
    sums = np.array([float((change[span] - mean).sum()) for span in spans])
    n_rows = len(spans)
    return Estimate(mean, math.sqrt(n_rows / (n_rows - 1) * float(sums @ sums)) / len(change))


def choice_of_scores(
    scores: Scores,
    same: Mapping[str, str],
    held_out: MeasuredText,
    other: MeasuredText | None,
) -> ChoiceRecord:
    """The records of all candidates, and the best one by the rule.

    `scores` are of the rows of `held_out` and then of `other`; `same` names, by candidate, the one
    whose scores it has. Raises EvaluationError for a perplexity beyond all numbers.
    """
    n_held = len(held_out.rows)
    of_held, of_other = scores.part(0, n_held), scores.part(n_held, len(scores.rows))
    measured = list(dict.fromkeys(same.values()))
    held_figures = _figures(of_held, measured)
    other_figures = None if other is None else _figures(of_other, measured)
    candidates = tuple(
        CandidateRecord(
            name,
            held_figures[first],
            None if other_figures is None else other_figures[first],
            None if first == name else first,
        )
        for name, first in same.items()
    )
    return ChoiceRecord(
        best(candidates).name,
        _text(held_out, of_held),
        None if other is None else _text(other, of_other),
        candidates,
    )


def _figures(scores: Scores, names: Sequence[str]) -> dict[str, Figures]:
    """The figures of each candidate on one text."""
    apart = {name: scores.divergences[SOURCE, name] for name in names}
    lowest = min(names, key=lambda name: float(apart[name].mean()))
    spans = scores.spans()
    return {
        name: Figures(
            _perplexity(name, scores),
            mean_of(apart[name]),
            difference(apart[name], apart[lowest], spans),
        )
        for name in names
    }


def _perplexity(name: str, scores: Scores) -> Estimate:
    try:
        return perplexity(scores.variants[name].nll)
    except OverflowError as error:
        raise EvaluationError(
            f"{name}: its perplexity is beyond all numbers; leave it out with --candidates"
        ) from error


def _text(text: MeasuredText, scores: Scores) -> ChoiceText:
    return ChoiceText(
        text.label,
        text.sha256,
        len(text.rows),
        sum(len(row.tokens) for row in text.rows),
        sum(row.n_scored for row in text.rows),
        _perplexity(SOURCE, scores),
    )
