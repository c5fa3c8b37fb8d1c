"""Sums over routed tokens: powers of the gate weight times powers of the output's norm.

REAP (arXiv 2510.13999) is one of the criteria that are quotients of them (`pruning/methods.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from reap2gguf.artifacts.observations import LayerObservation, grouped_layers, named_layers
from reap2gguf.errors import ObservationError
from reap2gguf.observing.compute.experts import RoutedPairs, watch
from reap2gguf.observing.compute.kernels import saliency_sums
from reap2gguf.observing.observer import Arrays, LayerObserver

if TYPE_CHECKING:
    from reap2gguf.models.contract import MoeModel


# as `saliency_sums` returns them
_SUMS = (
    *("reap_sum", "gate_sum", "norm_sum", "gate2_sum", "norm2_sum"),
    *("gate2_norm_sum", "gate_norm2_sum", "gate2_norm2_sum"),
)
_PEAKS = ("norm_max", "output_max")


class SaliencyObserver(LayerObserver):
    """Sums per expert of one layer at a time; float64, so that batches may come in any order."""

    wants_norms = True

    def __init__(self, model: MoeModel) -> None:
        super().__init__(model)
        self.layers: dict[int, LayerObservation] = {}
        self._pending_peaks: list[tuple[Tensor, Tensor]] = []
        self._counts = self._sums = self._peaks = torch.empty(0)

    def last_layer(self) -> int:
        """The last layer with experts."""
        return self._model.facts.moe_layers[-1]

    def attach(self, index: int, layer: torch.nn.Module) -> None:
        n_experts = self._model.facts.n_experts
        self._counts = torch.zeros(n_experts, dtype=torch.int64, device=self._device)
        self._sums = torch.zeros(n_experts, len(_SUMS), dtype=torch.float64, device=self._device)
        self._peaks = torch.zeros(n_experts, len(_PEAKS), dtype=torch.float64, device=self._device)
        if index in self._model.facts.moe_layers:
            watch(layer.get_submodule(self._model.experts_path(index)), self)

    def see(self, pairs: RoutedPairs) -> None:
        """Count the pairs of each expert, sum gates and norms, and find the largest ones."""
        assert pairs.norms is not None
        sums, peaks = saliency_sums(pairs.norms, pairs.gates, pairs.ends)
        experts = slice(pairs.first_expert, pairs.first_expert + len(pairs.ends))
        self._add(self._counts[experts], pairs.counts)
        self._add(self._sums[experts], sums)
        self._pending_peaks.append((self._peaks[experts], peaks))

    def settle(self, good: Tensor) -> None:
        super().settle(good)
        self._pending_peaks = [(top, torch.where(good, new, 0)) for top, new in self._pending_peaks]

    def commit(self) -> None:
        super().commit()
        for top, new in self._pending_peaks:
            torch.maximum(top, new, out=top)
        self._pending_peaks.clear()

    def discard(self) -> None:
        super().discard()
        self._pending_peaks.clear()

    def sums(self) -> Iterable[Tensor]:
        return (self._counts, self._sums)

    def peaks(self) -> Iterable[Tensor]:
        return (self._peaks,)

    def finish(self, index: int, sums: Sequence[Tensor], peaks: Sequence[Tensor]) -> None:
        if index not in self._model.facts.moe_layers:
            return
        counts, columns = sums
        found = np.concatenate((columns.T.numpy(), peaks[0].T.numpy()))
        named = dict(zip(_SUMS + _PEAKS, map(np.ascontiguousarray, found), strict=True))
        seen = LayerObservation(count=counts.numpy(), **named)
        _check_finite(index, seen)
        self.layers[index] = seen

    def finished_sums(self) -> Arrays:
        return named_layers(self.layers)

    def restore(self, arrays: Arrays) -> None:
        self.layers = grouped_layers(arrays)


def _check_finite(index: int, seen: LayerObservation) -> None:
    """Raise ObservationError if the norm of an expert's output overflows float32."""
    sums = np.stack([getattr(seen, name) for name in _SUMS + _PEAKS])
    bad = np.flatnonzero(~np.isfinite(sums).all(axis=0))
    if len(bad):
        raise ObservationError(
            f"layer {index}: the norm of the output of expert {bad[0]} overflows float32 (as do "
            f"{len(bad)} of {len(seen.count)} experts); its weights are damaged or far too large"
        )
