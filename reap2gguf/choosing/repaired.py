"""The best candidate with its kept experts repaired, as one candidate more.

A repair takes a sweep of its own, so only the candidate that is best without one is repaired, on
the rows that rank experts. It is measured on the same texts beside the source, and the same rule
takes or drops it. The rows that are held out to choose are not read by the repair.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from reap2gguf.choosing.names import REPAIRED
from reap2gguf.errors import Reap2ggufError
from reap2gguf.repairing.limits import check_repair, check_rows

if TYPE_CHECKING:
    from reap2gguf.checkpoint.weights import Weights
    from reap2gguf.evaluating.scores import Scores
    from reap2gguf.models.contract import MoeModel


def why_not_repaired(source: Weights, model: MoeModel, n_rows: int | None = None) -> str:
    """Why a repair is not defined for a model, or cannot be fitted on so few rows; "" if it can."""
    try:
        check_repair(source, model, True)
        if n_rows is not None:
            check_rows(n_rows)
    except Reap2ggufError as error:
        return f"no candidate is repaired: {error}"
    return ""


def repaired_name(name: str) -> str:
    """What a candidate is called when its kept experts are repaired."""
    return f"{name}{REPAIRED}"


def joined_scores(first: Scores, second: Scores) -> Scores:
    """What two sweeps found on the same rows; both have measured the source."""
    return replace(
        first,
        variants={**second.variants, **first.variants},
        divergences={**second.divergences, **first.divergences},
    )
