"""The importance matrix, collected as llama-imatrix does: sums of squares of every matrix's input.

Expert matrices have one sum per expert; matrices that multiply the same input share their sums.
Matrices of a latent attention have the sums of all heads in one row, and one count.
Two matrices have no entry, as in llama-imatrix: the token embedding, which is looked up and not
multiplied, and the output matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from reap2gguf.errors import ObservationError
from reap2gguf.gguf_files.imatrix import ImatrixEntry
from reap2gguf.observing.budget import importance_bytes
from reap2gguf.observing.compute.crew import current_slice
from reap2gguf.observing.compute.experts import RoutedPairs, watch
from reap2gguf.observing.compute.kernels import all_square_sums, square_sums
from reap2gguf.observing.latents import LatentWatch
from reap2gguf.observing.observer import Arrays, LayerObserver

if TYPE_CHECKING:
    from reap2gguf.models.contract import MoeModel
    from reap2gguf.models.description import HeadMatrices

MatrixNames = tuple[str, ...]  # GGUF matrices that share an input


class ImportanceObserver(LayerObserver):
    """Sums of squares per matrix of one layer at a time, in float64; finished ones in float32."""

    wants_squares = True

    def __init__(
        self, model: MoeModel, publish: Callable[[ImatrixEntry], None] | None = None
    ) -> None:
        """`publish` gets each entry when it is final."""
        super().__init__(model)
        self.entries: dict[str, ImatrixEntry] = {}
        self._publish = publish
        self._sums: dict[MatrixNames, Tensor] = {}  # (1 or E, columns) float64
        self._counts: dict[MatrixNames, Tensor] = {}  # (1 or E,) int64
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._by_inputs: MatrixNames = ()
        self._by_activations: MatrixNames = ()
        self._watch: LatentWatch | None = None

    @property
    def sees_experts(self) -> bool:
        """Whether the layer it is attached to has experts that it sums."""
        return bool(self._by_inputs)

    def last_layer(self) -> int:
        return self._model.facts.n_blocks - 1

    def start(self, index: int) -> None:
        """Publish the entries of the layers that an earlier sweep has finished."""
        self._publish_all(names for layer in range(index) for names in self._names(layer))

    def attach(self, index: int, layer: torch.nn.Module) -> None:
        """Start a layer: hook into its matrices and experts, with sums of zero."""
        self._sums, self._counts = {}, {}
        if index >= self._model.n_gguf_blocks:
            return  # no file has matrices of it
        for path, names in self._model.matrices(index).items():
            module: Any = layer.get_submodule(path)
            self._begin(names, 1, module.weight.shape[-1])
            hook = partial(self._see_input, names)
            self._hooks.append(module.register_forward_pre_hook(hook))
        if index in self._model.facts.moe_layers:
            facts = self._model.facts
            self._by_inputs, self._by_activations = self._model.expert_matrices(index)
            self._begin(self._by_inputs, facts.n_experts, facts.expert_io_width)
            self._begin(self._by_activations, facts.n_experts, facts.expert_width)
            watch(layer.get_submodule(self._model.experts_path(index)), self)
        if (heads := self._model.head_matrices(index)) is not None:
            self._attach_heads(layer, heads)

    def _attach_heads(self, layer: torch.nn.Module, heads: HeadMatrices) -> None:
        """Watch an attention whose heads have matrices of their own: sums of all in one row."""
        queries, sums = (heads.queries,), (heads.sums,)
        self._begin(queries, 1, heads.n_heads * heads.query_width)
        self._begin(sums, 1, heads.n_heads * heads.sum_width)
        total = self._sums[sums].view(heads.n_heads, heads.sum_width)

        def see_queries(values: Tensor) -> None:
            self._see_values(queries, values.flatten(2))

        def see_sums(values: Tensor, columns: slice) -> None:
            real = self._of_real_tokens(values.flatten(2))
            self._add(total[:, columns], all_square_sums(real).view(heads.n_heads, -1))
            if columns.start == 0:
                self._count(sums, real)

        self._watch = LatentWatch(layer, heads, see_queries, see_sums)

    def _begin(self, names: MatrixNames, n_matrices: int, n_columns: int) -> None:
        shape = (n_matrices, n_columns)
        self._sums[names] = torch.zeros(shape, dtype=torch.float64, device=self._device)
        self._counts[names] = torch.zeros(n_matrices, dtype=torch.int64, device=self._device)

    def _see_input(
        self, names: MatrixNames, module: torch.nn.Module, arguments: tuple[Any, ...]
    ) -> None:
        self._see_values(names, arguments[0])

    def _see_values(self, names: MatrixNames, values: Tensor) -> None:
        """Take in what matrices multiply, (B, T, columns)."""
        real = self._of_real_tokens(values)
        self._add(self._sums[names], all_square_sums(real))
        self._count(names, real)

    def _of_real_tokens(self, values: Tensor) -> Tensor:
        """Rows (N, columns) of values (B, T, columns), those of padding left out."""
        values = values.reshape(-1, values.shape[-1])
        if self.real_tokens is None:
            return values
        part, real = current_slice(), self.real_tokens
        return values[real.positions if part is None else real.mask[part.begin : part.end]]

    def _count(self, names: MatrixNames, values: Tensor) -> None:
        count = torch.full((1,), len(values), device=values.device)
        self._add(self._counts[names], count)

    def see(self, pairs: RoutedPairs) -> None:
        """Sums (E, H) for gate and up, (E, F) for down."""
        experts = slice(pairs.first_expert, pairs.first_expert + len(pairs.ends))
        for names, values, squares in (
            (self._by_inputs, pairs.inputs, pairs.input_squares),
            (self._by_activations, pairs.activations, pairs.activation_squares),
        ):
            if squares is None:
                assert values is not None
                squares = square_sums(values, pairs.ends)
            self._add(self._sums[names][experts], squares)
            self._add(self._counts[names][experts], pairs.counts)

    def sums(self) -> Iterable[Tensor]:
        return (*self._sums.values(), *self._counts.values())

    def detach(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        if self._watch is not None:
            self._watch.close()
            self._watch = None

    def _names(self, index: int) -> list[MatrixNames]:
        """The matrices of a layer, in the order of their sums."""
        if index >= self._model.n_gguf_blocks:
            return []
        names = list(self._model.matrices(index).values())
        if index in self._model.facts.moe_layers:
            names += self._model.expert_matrices(index)
        if (heads := self._model.head_matrices(index)) is not None:
            names += [(heads.queries,), (heads.sums,)]
        return names

    def finish(self, index: int, sums: Sequence[Tensor], peaks: Sequence[Tensor]) -> None:
        """Keep a layer's sums as float32, the type of the files."""
        all_names = self._names(index)
        n_names = len(all_names)
        for names, exact, count in zip(all_names, sums[:n_names], sums[n_names:], strict=True):
            with np.errstate(over="ignore"):  # it is looked for in the next line
                values = exact.numpy().astype(np.float32)
            if not np.isfinite(values).all():
                raise ObservationError(
                    f"layer {index}: the squares of what {names[0]} multiplies overflow float32; "
                    "weights of this layer or the one before are damaged or far too large"
                )
            counts = count.numpy()
            for name in names:
                order = self._model.column_order(name)
                ordered = values if order is None else values[:, order]
                self.entries[name] = ImatrixEntry(name, ordered, counts)
        self._publish_all(all_names)

    def _publish_all(self, matrices: Iterable[MatrixNames]) -> None:
        if self._publish is not None:
            for name in chain.from_iterable(matrices):
                self._publish(self.entries[name])

    def held_bytes(self) -> int:
        return importance_bytes(self._model)

    def finished_sums(self) -> Arrays:
        sums = {f"{name}.sums": entry.sums for name, entry in self.entries.items()}
        return sums | {f"{name}.counts": entry.counts for name, entry in self.entries.items()}

    def restore(self, arrays: Arrays) -> None:
        names = [name.removesuffix(".sums") for name in arrays if name.endswith(".sums")]
        for name in names:
            sums, counts = arrays[f"{name}.sums"], arrays[f"{name}.counts"]
            if sums.ndim != 2 or counts.shape != sums.shape[:1]:
                raise ValueError(f"sums {sums.shape} and counts {counts.shape} of {name}")
            self.entries[name] = ImatrixEntry(
                name, sums.astype(np.float32), counts.astype(np.int64)
            )
