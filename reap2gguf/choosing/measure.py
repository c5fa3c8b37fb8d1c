"""The choice: candidates in one sweep, and one sweep more if the best of them is repaired.

Each candidate is a view of the source with the experts that it keeps. What evaluates and what
repairs is passed in, since both load torch.

Candidates that keep the same experts are one variant. Memory and time are those of an evaluation
(`evaluating/engine.py`): two layers, and the hidden states of all variants.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from reap2gguf.choosing.candidates import first_with_same
from reap2gguf.choosing.figures import SOURCE, choice_of_scores
from reap2gguf.choosing.repaired import joined_scores, repaired_name
from reap2gguf.evaluating.variants import Variant
from reap2gguf.pruning.view import PrunedView

if TYPE_CHECKING:
    from reap2gguf.bundle.choice import ChoiceRecord
    from reap2gguf.bundle.evaluation import Kind
    from reap2gguf.checkpoint.weights import Weights
    from reap2gguf.choosing.texts import MeasuredText
    from reap2gguf.evaluating.scores import Pair, ScoredRow, Scores
    from reap2gguf.models.contract import MoeModel
    from reap2gguf.pruning.select import Kept


@dataclass(frozen=True)
class Measurement:
    """What `evaluate_variants` is asked: pruned models beside their source, on one or two texts."""

    source: Weights
    model: MoeModel  # of the source
    views: Mapping[str, PrunedView]  # by candidate
    held_out: MeasuredText
    other: MeasuredText | None

    @cached_property
    def variants(self) -> Sequence[Variant]:
        """The source, and every pruned model."""
        pruned = [_variant(name, "pruned", one, one.model) for name, one in self.views.items()]
        return [_variant(SOURCE, "source", self.source, self.model), *pruned]

    @property
    def rows(self) -> Sequence[ScoredRow]:
        """Those of both texts."""
        return [*self.held_out.rows, *(() if self.other is None else self.other.rows)]

    @property
    def pairs(self) -> Sequence[Pair]:
        """Each pruned model is compared with the source."""
        return [(SOURCE, name) for name in self.views]


def pruned_views(
    source: Weights, model: MoeModel, kept: Mapping[str, Kept]
) -> dict[str, PrunedView]:
    """A view for each candidate, but for those that keep the same experts as an earlier one."""
    names = dict.fromkeys(first_with_same(kept).values())
    return {name: PrunedView(source, model, kept[name]) for name in names}


def _variant(name: str, kind: Kind, weights: Weights, model: MoeModel) -> Variant:
    bits = 8 * weights.n_bytes / weights.n_parameters
    return Variant(name, kind, weights, model, weights.n_bytes, bits)


Evaluates = Callable[[Measurement], "Scores"]
# the repaired model of a view, whose files are open as long as the stack
Repairs = Callable[["PrunedView", ExitStack], "PrunedView"]


@dataclass(frozen=True)
class Chooser:
    """A model, the experts that each criterion keeps of it, merged ones, and the texts."""

    source: Weights
    model: MoeModel  # of the source
    kept: Mapping[str, Kept]
    held_out: MeasuredText
    other: MeasuredText | None
    merged: Mapping[str, PrunedView] = field(default_factory=dict)

    def choose(
        self, evaluate: Evaluates, repair: Repairs | None
    ) -> tuple[ChoiceRecord, dict[str, float]]:
        """All candidates and the best one; seconds by candidate, of what it takes to make it.

        Without `repair`, none is repaired. Raises EvaluationError for a broken candidate, and what
        both functions raise.
        """
        criteria = first_with_same(self.kept)
        same = {**criteria, **{name: name for name in self.merged}}
        views = pruned_views(self.source, self.model, self.kept)
        scores = evaluate(self._asked({**views, **self.merged}))
        if repair is None:
            return choice_of_scores(scores, same, self.held_out, self.other), {}
        # a repair is of removed experts: the best criterion gets one, whatever a merge costs
        best = choice_of_scores(scores, criteria, self.held_out, self.other).chosen
        name, begun = repaired_name(best), time.monotonic()
        with ExitStack() as stack:
            repaired = repair(views[criteria[best]], stack)
            seconds = {name: time.monotonic() - begun}
            more = evaluate(self._asked({name: repaired}))
        scores = joined_scores(scores, more)
        return choice_of_scores(scores, {**same, name: name}, self.held_out, self.other), seconds

    def _asked(self, views: Mapping[str, PrunedView]) -> Measurement:
        return Measurement(self.source, self.model, views, self.held_out, self.other)
