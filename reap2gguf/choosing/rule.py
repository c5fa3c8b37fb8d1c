"""The rule by which one candidate is taken.

The candidates that are not worse on the text of another domain than the best one there: those whose
mean KL divergence is above the lowest by at most two standard errors of that difference. Of these,
the one with the lowest mean KL divergence on the held-out rows; of equal ones, the first. Without a
text of another domain the held-out rows decide alone.

So the calibration decides, unless a candidate buys its figure there with damage elsewhere, as a fit
to the calibration would.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from reap2gguf.bundle.choice import CandidateRecord, Figures

ERRORS = 2.0  # standard errors of a difference; more are significant
RULE = (
    "the lowest mean KL divergence from the source on the held-out rows, among the candidates that "
    "are not worse on the other text than the best one there by more than two standard errors"
)
RULE_ALONE = "the lowest mean KL divergence from the source on the held-out rows"


def is_as_good(figures: Figures | None) -> bool:
    """Whether a candidate cannot be told from the best one of a text; also where none was read."""
    return figures is None or figures.behind.value <= ERRORS * figures.behind.error


def best(candidates: Sequence[CandidateRecord]) -> CandidateRecord:
    """The candidate to take, of at least one."""
    # the best on the other text is always among them: it is behind by nothing
    possible = [one for one in candidates if is_as_good(one.other)]
    return min(possible, key=lambda one: one.held_out.divergence.value)
