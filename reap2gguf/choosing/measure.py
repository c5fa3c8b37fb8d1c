"""Candidates in one sweep: views of the source, each with the experts that it keeps.

Candidates that keep the same experts are one variant. Memory and time are those of an evaluation
(`evaluating/engine.py`): two layers, and the hidden states of all variants.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from reap2gguf.choosing.candidates import first_with_same
from reap2gguf.choosing.figures import SOURCE
from reap2gguf.evaluating.variants import Variant
from reap2gguf.pruning.view import PrunedView

if TYPE_CHECKING:
    from reap2gguf.bundle.evaluation import Kind
    from reap2gguf.checkpoint.weights import Weights
    from reap2gguf.choosing.texts import MeasuredText
    from reap2gguf.evaluating.scores import Pair, ScoredRow
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
