"""Saliency and importance in one sweep: what ranks the experts, and sums for all of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from reap2gguf.observing.compute.experts import RealTokens, RoutedPairs, watch
from reap2gguf.observing.observer import Arrays, LayerObserver

if TYPE_CHECKING:
    from reap2gguf.models.contract import MoeModel
    from reap2gguf.observing.importance import ImportanceObserver
    from reap2gguf.observing.saliency import SaliencyObserver

_SALIENCY, _IMPORTANCE = "saliency:", "importance:"  # before names of arrays


class JointObserver(LayerObserver):
    """Both observers at the same layer. Each has the sums that it has alone."""

    wants_norms = True
    wants_squares = True

    def __init__(
        self, model: MoeModel, saliency: SaliencyObserver, importance: ImportanceObserver
    ) -> None:
        self.saliency, self.importance = saliency, importance
        self._both: tuple[LayerObserver, ...] = (saliency, importance)
        super().__init__(model)

    def unused(self) -> JointObserver:
        alone = type(self.saliency)(self._model), type(self.importance)(self._model)
        other = JointObserver(self._model, *alone)
        other.use(self._device)
        return other

    @property
    def real_tokens(self) -> RealTokens | None:
        """Which positions of the batch are tokens; None if all are."""
        return self.saliency.real_tokens

    @real_tokens.setter
    def real_tokens(self, real: RealTokens | None) -> None:
        for one in self._both:
            one.real_tokens = real

    def use(self, device: torch.device) -> None:
        super().use(device)
        for one in self._both:
            one.use(device)

    def last_layer(self) -> int:
        return max(one.last_layer() for one in self._both)

    def attach(self, index: int, layer: torch.nn.Module) -> None:
        for one in self._both:
            one.attach(index, layer)
        if index in self._model.facts.moe_layers:  # experts show their pairs to one observer
            watch(layer.get_submodule(self._model.experts_path(index)), self)

    def see(self, pairs: RoutedPairs) -> None:
        self.saliency.see(pairs)
        if self.importance.sees_experts:
            self.importance.see(pairs)

    def detach(self) -> None:
        for one in self._both:
            one.detach()

    def sums(self) -> Iterable[Tensor]:
        return chain.from_iterable(one.sums() for one in self._both)

    def peaks(self) -> Iterable[Tensor]:
        return self.saliency.peaks()

    def finish(self, index: int, sums: Sequence[Tensor], peaks: Sequence[Tensor]) -> None:
        n_own = len(tuple(self.saliency.sums()))
        self.saliency.finish(index, sums[:n_own], peaks)
        self.importance.finish(index, sums[n_own:], ())

    def held_bytes(self) -> int:
        return self.importance.held_bytes()

    def finished_sums(self) -> Arrays:
        return {
            start + name: values
            for start, one in zip((_SALIENCY, _IMPORTANCE), self._both, strict=True)
            for name, values in one.finished_sums().items()
        }

    def restore(self, arrays: Arrays) -> None:
        for start, one in zip((_SALIENCY, _IMPORTANCE), self._both, strict=True):
            one.restore(
                {
                    name.removeprefix(start): values
                    for name, values in arrays.items()
                    if name.startswith(start)
                }
            )

    def settle(self, good: Tensor) -> None:
        for one in self._both:
            one.settle(good)

    def commit(self) -> None:
        for one in self._both:
            one.commit()

    def discard(self) -> None:
        for one in self._both:
            one.discard()
