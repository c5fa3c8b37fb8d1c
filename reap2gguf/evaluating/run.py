"""One variant's way through the layers, side by side with the other variants.

It is a sweep that observes nothing. The weights of a pruned model that is a view of another variant
are not read: they are taken over from that variant's layer, in place, when it has computed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from reap2gguf.errors import EvaluationError
from reap2gguf.observing.narrowed import narrowed
from reap2gguf.observing.observer import Arrays, LayerObserver
from reap2gguf.observing.sweep import Sweep

if TYPE_CHECKING:
    from reap2gguf.observing.compute.experts import RoutedPairs
    from reap2gguf.observing.layer_group import LayerGroup
    from reap2gguf.observing.loader import Tensors
    from reap2gguf.pruning.select import Kept


class Unobserved(LayerObserver):
    """Watches nothing, in all layers of the trunk."""

    def last_layer(self) -> int:
        return self._model.facts.n_layers - 1

    def attach(self, index: int, layer: torch.nn.Module) -> None:
        """Nothing is hooked."""

    def see(self, pairs: RoutedPairs) -> None:
        """Nothing is counted."""

    def finish(self, index: int, sums: Sequence[Tensor], peaks: Sequence[Tensor]) -> None:
        """Nothing is kept."""

    def sums(self) -> Iterable[Tensor]:
        return ()

    def finished_sums(self) -> Arrays:
        return {}

    def restore(self, arrays: Arrays) -> None:
        """Nothing was kept."""


class VariantRun(Sweep):
    """A variant's batches, and the spool where their hidden states wait."""

    keeps_output = True  # of which the head computes the scores
    base: VariantRun | None = None  # whose layers this variant has, with fewer experts
    kept: Kept | None = None  # the base's experts that it has
    replaced: Collection[str] = ()  # tensors that it does not share with the base
    n_views = 0  # variants that take over its layers
    begin_next: Callable[[], None] = staticmethod(lambda: None)  # begins to read what comes next
    _held: tuple[int, int] | None = None  # a layer whose weights wait, and for how many views

    def takes_over(self, index: int) -> bool:
        """Whether the weights of a layer are taken over, not read."""
        return self.base is not None and index >= self.base.plan.first_layer

    def begin(self, index: int) -> None:
        """Begin to read a layer, if there is memory for two."""
        if not self.decoder.has_layer(index):
            self.decoder.fetch_layer(index)
            self.prefetch(index)

    def _begin_first(self) -> None:
        """All variants are embedded first."""

    def _begin_next(self, index: int) -> None:
        if not self._has_begun:
            self._has_begun = True
            self.begin_next()

    def _load(self, index: int) -> torch.nn.Module:
        if self.base is None or not self.takes_over(index):
            return super()._load(index)
        tensors, is_last = self.base.hand_over(index)
        shapes, kept = self.decoder.layer_shapes(index), (self.kept or {}).get(index, ())
        found = narrowed(tensors, shapes, kept, is_last)
        if self.replaced:
            found |= self._own(index)
        return self.decoder.place_layer(index, found)

    def _own(self, index: int) -> Tensors:
        """The weights of a layer that are not the base's, read at once."""
        targets = {
            name: target
            for name, target in self.decoder.targets(index).items()
            if any(run.stored in self.replaced for run in target.runs)
        }
        key = f"layer {index}, replaced"
        self.decoder.loader.ask(key, targets)
        return self.decoder.loader.take(key)

    def _drop(self, index: int) -> None:
        if self.n_views:
            self._held = index, self.n_views
        else:
            super()._drop(index)

    def hand_over(self, index: int) -> tuple[Tensors, bool]:
        """The weights of a layer that it has computed, and whether nobody else waits for them."""
        assert self._held is not None
        tensors, n_left = self.decoder.layer_tensors(index), self._held[1] - 1
        self._held = (index, n_left) if n_left else None
        if not n_left:
            self.decoder.drop_layer(index)
        return tensors, not n_left

    def _without_bad_rows(self, group: LayerGroup, finite: Tensor) -> list[int]:
        """Rows cannot be dropped, since the other variants have them."""
        index = group.layers[-1]
        n_bad = int((~finite).sum())
        raise EvaluationError(
            f"{self.decoder.weights.shown}: layer {index}: {n_bad} of {finite.shape[1]} rows are "
            f"NaN or infinite; {self.decoder.why_not_finite(index)}"
        )
