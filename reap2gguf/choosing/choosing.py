"""The choice itself: a sweep over all criteria, and one more if the best of them is repaired.

What evaluates and what repairs is passed in, since both load torch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from reap2gguf.choosing.candidates import first_with_same
from reap2gguf.choosing.figures import choice_of_scores
from reap2gguf.choosing.measure import Measurement, pruned_views
from reap2gguf.choosing.repaired import joined_scores, repaired_name

if TYPE_CHECKING:
    from reap2gguf.bundle.choice import ChoiceRecord
    from reap2gguf.checkpoint.weights import Weights
    from reap2gguf.choosing.texts import MeasuredText
    from reap2gguf.evaluating.scores import Scores
    from reap2gguf.models.contract import MoeModel
    from reap2gguf.pruning.select import Kept
    from reap2gguf.pruning.view import PrunedView

Evaluates = Callable[[Measurement], "Scores"]
# the repaired model of a view, whose files are open as long as the stack
Repairs = Callable[["PrunedView", ExitStack], "PrunedView"]


@dataclass(frozen=True)
class Chooser:
    """A model, the experts that each criterion keeps of it, and the texts."""

    source: Weights
    model: MoeModel  # of the source
    kept: Mapping[str, Kept]
    held_out: MeasuredText
    other: MeasuredText | None

    def choose(
        self, evaluate: Evaluates, repair: Repairs | None
    ) -> tuple[ChoiceRecord, dict[str, float]]:
        """All candidates and the best one; seconds by candidate, of what it takes to make it.

        Without `repair`, none is repaired. Raises EvaluationError for a broken candidate, and what
        both functions raise.
        """
        same = first_with_same(self.kept)
        views = pruned_views(self.source, self.model, self.kept)
        scores = evaluate(self._asked(views))
        found = choice_of_scores(scores, same, self.held_out, self.other)
        if repair is None:
            return found, {}
        best = same[found.chosen]
        name, begun = repaired_name(found.chosen), time.monotonic()
        with ExitStack() as stack:
            repaired = repair(views[best], stack)
            seconds = {name: time.monotonic() - begun}
            more = evaluate(self._asked({name: repaired}))
        scores = joined_scores(scores, more)
        return choice_of_scores(scores, {**same, name: name}, self.held_out, self.other), seconds

    def _asked(self, views: Mapping[str, PrunedView]) -> Measurement:
        return Measurement(self.source, self.model, views, self.held_out, self.other)
