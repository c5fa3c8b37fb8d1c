"""All candidates in one sweep: views of the source, each with the experts that it keeps.

Candidates that keep the same experts are one variant. Memory and time are those of an evaluation
(`evaluating/engine.py`): two layers, and the hidden states of all variants.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from reap2gguf.choosing.candidates import first_with_same
from reap2gguf.choosing.figures import SOURCE, choice_of_scores
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
    """What `evaluate_variants` is asked, and the choice that its scores make."""

    source: Weights
    model: MoeModel  # of the source
    kept: Mapping[str, Kept]  # by candidate, the experts that stay
    held_out: MeasuredText
    other: MeasuredText | None

    @cached_property
    def same(self) -> Mapping[str, str]:
        """By candidate, the one that is measured for it."""
        return first_with_same(self.kept)

    @cached_property
    def variants(self) -> Sequence[Variant]:
        """The source, and every pruned model once."""
        found = [_variant(SOURCE, "source", self.source, self.model)]
        for name in dict.fromkeys(self.same.values()):
            view = PrunedView(self.source, self.model, self.kept[name])
            found.append(_variant(name, "pruned", view, view.model))
        return found

    @property
    def rows(self) -> Sequence[ScoredRow]:
        """Those of both texts."""
        return [*self.held_out.rows, *(() if self.other is None else self.other.rows)]

    @property
    def pairs(self) -> Sequence[Pair]:
        """Each pruned model is compared with the source."""
        return [(SOURCE, one.name) for one in self.variants[1:]]

    def choice(self, scores: Scores) -> ChoiceRecord:
        """All candidates, and the best one. Raises EvaluationError for a broken one."""
        return choice_of_scores(scores, self.same, self.held_out, self.other)


def _variant(name: str, kind: Kind, weights: Weights, model: MoeModel) -> Variant:
    bits = 8 * weights.n_bytes / weights.n_parameters
    return Variant(name, kind, weights, model, weights.n_bytes, bits)
