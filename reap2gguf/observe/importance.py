"""The importance matrix, collected as llama-imatrix does: sums of squares of every matrix's input.

Expert matrices have one sum per expert; matrices that multiply the same input share one. The token
embedding is looked up, not multiplied, and llama-imatrix leaves the output matrix out unless asked:
neither has an entry, there as here.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reap2gguf.artifacts.imatrix import ImatrixEntry
from reap2gguf.models.contract import MoeModel
from reap2gguf.observe.experts import RoutedPairs, sum_by_expert, watch

Names = tuple[str, ...]  # GGUF matrices that share an input


class ImportanceObserver:
    """Sums of squares per matrix of one layer at a time; memory is one layer's, in float64."""

    def __init__(self, model: MoeModel) -> None:
        self._model = model
        self.entries: dict[str, ImatrixEntry] = {}
        self.real_tokens: Tensor | None = None
        self._pending: list[tuple[Names, Tensor, Tensor]] = []
        self._sums: dict[Names, tuple[Tensor, Tensor]] = {}
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._by_inputs: Names = ()
        self._by_activations: Names = ()

    def last_layer(self) -> int:
        return self._model.facts.n_blocks - 1

    def attach(self, index: int, layer: torch.nn.Module) -> None:
        """Begin a layer: hook its matrices and its experts."""
        self._sums.clear()
        for path, names in self._model.matrices(index).items():
            hook = partial(self._see_input, names)
            self._hooks.append(layer.get_submodule(path).register_forward_pre_hook(hook))
        if index in self._model.facts.moe_layers:
            self._by_inputs, self._by_activations = self._model.expert_matrices(index)
            watch(layer.get_submodule(self._model.experts_path(index)), self)

    def _see_input(self, names: Names, module: torch.nn.Module, arguments: tuple[Any, ...]) -> None:
        values = arguments[0].reshape(-1, arguments[0].shape[-1])
        if self.real_tokens is not None:
            values = values[self.real_tokens]
        sums = values.float().square().sum(0, keepdim=True)
        self._pending.append((names, sums, torch.tensor([len(values)])))

    def see(self, pairs: RoutedPairs) -> None:
        """One batch of routed pairs: sums (E, H) for gate and up, (E, F) for down."""
        for names, values in (
            (self._by_inputs, pairs.inputs),
            (self._by_activations, pairs.activations),
        ):
            sums = sum_by_expert(values.float().square(), pairs.counts)
            self._pending.append((names, sums, pairs.counts))

    def commit(self) -> None:
        """The last batch was finite: add its sums."""
        for names, sums, counts in self._pending:
            sums, counts = sums.double().cpu(), counts.cpu()
            if names in self._sums:
                before = self._sums[names]
                sums, counts = before[0] + sums, before[1] + counts
            self._sums[names] = (sums, counts)
        self._pending.clear()

    def discard(self) -> None:
        """Forget the last batch."""
        self._pending.clear()

    def finish(self, index: int) -> None:
        """End a layer: unhook, and keep its sums as float32, which the files hold."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for names, (sums, counts) in self._sums.items():
            values = sums.numpy().astype(np.float32)
            for name in names:
                order = self._model.column_order(name)
                ordered = values if order is None else values[:, order]
                self.entries[name] = ImatrixEntry(name, ordered, counts.numpy())
