"""REAP's sums (arXiv 2510.13999): gate weight times norm of the output, over routed tokens."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from reap2gguf.artifacts.observations import LayerObservation
from reap2gguf.models.contract import MoeModel
from reap2gguf.observe.experts import RoutedPairs, sum_by_expert, watch


class SaliencyObserver:
    """Sums per expert of one layer at a time; float64, so that batches may come in any order.

    A batch's sums are kept aside until it is committed: a batch with rows that turn out not to be
    finite is discarded and run again without them.
    """

    def __init__(self, model: MoeModel) -> None:
        self._model = model
        self.layers: dict[int, LayerObservation] = {}
        self.real_tokens: Tensor | None = None
        self._pending: list[tuple[Tensor, Tensor, Tensor]] = []
        self._counts = self._sums = self._peaks = torch.empty(0)

    def last_layer(self) -> int:
        """The last layer with experts: nothing after it is of interest."""
        return self._model.facts.moe_layers[-1]

    def attach(self, index: int, layer: torch.nn.Module) -> None:
        """Begin a layer."""
        n_experts = self._model.facts.n_experts
        self._counts = torch.zeros(n_experts, dtype=torch.int64)
        self._sums = torch.zeros(n_experts, 3, dtype=torch.float64)
        self._peaks = torch.zeros(n_experts, dtype=torch.float64)
        if index in self._model.facts.moe_layers:
            watch(layer.get_submodule(self._model.experts_path(index)), self)

    def see(self, pairs: RoutedPairs) -> None:
        """One batch: counts (E,), sums (E, 3) of reap, gate and norm, and norm maxima (E,)."""
        norms = torch.linalg.vector_norm(pairs.outputs, dim=-1, dtype=torch.float32).double()
        gates = pairs.gates.double()
        sums = sum_by_expert(torch.stack((gates * norms, gates, norms), dim=-1), pairs.counts)
        peaks = torch.segment_reduce(norms, "max", lengths=pairs.counts, unsafe=True, initial=0)
        self._pending.append((pairs.counts, sums, peaks))

    def commit(self) -> None:
        """The last batch was finite: add its sums."""
        for counts, sums, peaks in self._pending:
            self._counts += counts.cpu()
            self._sums += sums.cpu()
            self._peaks = torch.maximum(self._peaks, peaks.cpu())
        self._pending.clear()

    def discard(self) -> None:
        """Forget the last batch."""
        self._pending.clear()

    def finish(self, index: int) -> None:
        """End a layer and keep its sums."""
        if index not in self._model.facts.moe_layers:
            return
        reap, gate, norm = (np.ascontiguousarray(column) for column in self._sums.T.numpy())
        self.layers[index] = LayerObservation(
            count=self._counts.numpy(),
            reap_sum=reap,
            gate_sum=gate,
            norm_sum=norm,
            norm_max=self._peaks.numpy(),
        )
