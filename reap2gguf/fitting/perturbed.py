"""A model some of whose tensors went through a type and back, without a file of it.

Rows are quantized with the importance of their columns when they are read, as an export does it,
and dequantized, as llama.cpp computes with them. All other tensors are the source's own.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as Type

from reap2gguf.exporting.row_ranges import BlockMaker, RowRange
from reap2gguf.gguf_files.reader import GgufTensorInfo
from reap2gguf.gguf_files.rows import rows_per_matrix
from reap2gguf.gguf_files.tensor_types import row_bytes
from reap2gguf.gguf_source.weights import GgufWeights
from reap2gguf.pruning.view import PrunedView

if TYPE_CHECKING:
    from pathlib import Path

    from reap2gguf.models.contract import MoeModel
    from reap2gguf.models.description import GgufTensor


@dataclass(frozen=True)
class _Made:
    """Blocks of a model that are made when they are read: F32 where no other type is given."""

    host: BlockMaker
    of_model: Mapping[str, GgufTensor]
    types: Mapping[str, Type]

    @property
    def path(self) -> Path:
        return self.host.weights.folder

    @cached_property
    def tensors(self) -> dict[str, GgufTensorInfo]:
        """All tensors; they lie nowhere."""
        found = {}
        for name, tensor in self.of_model.items():
            one = self.types.get(name, Type.F32)
            n_bytes = prod(tensor.shape[:-1]) * row_bytes(one, tensor.n_columns)
            found[name] = GgufTensorInfo(name, one, tensor.shape, 0, n_bytes)
        return found

    def read(self, name: str, first: int = 0, last: int | None = None) -> npt.NDArray[np.uint8]:
        """Rows [first, last) of one matrix of a tensor. Raises CheckpointError as an export."""
        tensor = self.of_model[name]
        n_rows = rows_per_matrix(tensor)
        matrix, begin = divmod(first, n_rows)
        end = n_rows if last is None else begin + last - first
        rows = RowRange(tensor, matrix, tensor.slabs[matrix], begin, end)
        values = np.ascontiguousarray(self.host.read(rows))
        one = self.types.get(name, Type.F32)
        if one is Type.F32:
            return values.view(np.uint8)
        return self.host.quantize(rows, values, one)


class PerturbedView(PrunedView):
    """The weights of a source, of which some tensors have the values that a type leaves.

    It is a view that keeps all experts, so that an evaluation reads the source's layers once for
    all such views, and of each only what it replaces. Threads may share it. Memory: as
    `GgufWeights`.
    """

    _blocks: GgufWeights | None = None  # while the view without them is made
    _names: frozenset[str] = frozenset()

    def with_values(self, blocks: GgufWeights, names: Iterable[str]) -> PerturbedView:
        """This view with some stored tensors, by name, read from blocks."""
        other = copy.copy(self)
        other._blocks, other._names = blocks, frozenset(names)
        other.tensors = {
            name: replace(stored, dtype="F32", coded="", blocks={})
            if name in other._names
            else stored
            for name, stored in self.tensors.items()
        }
        return other

    @property
    def replaced(self) -> Collection[str]:
        return self._names

    def origin(self, name: str, entry: int = 0) -> tuple[str, int]:
        found, at = super().origin(name, entry)
        # no other variant has these values: an evaluation shares heads by their names
        return (f"{found}, perturbed", at) if name in self._names else (found, at)

    def read_bytes(self, name: str, first: int, buffer: npt.NDArray[np.uint8]) -> None:
        if name in self._names and self._blocks is not None:
            self._blocks.read_bytes(name, first, buffer)
        else:
            super().read_bytes(name, first, buffer)

    def expect_bytes(self, name: str, first: int, n_bytes: int) -> None:
        if name not in self._names:
            super().expect_bytes(name, first, n_bytes)

    def have_same_values(self, one: str, other: str) -> bool:
        if one in self._names or other in self._names:
            return one == other
        return super().have_same_values(one, other)


class Perturbing:
    """Makes models that differ from a source in the types of a few tensors."""

    def __init__(self, host: BlockMaker, model: MoeModel) -> None:
        """`host` reads the source and quantizes; `model` describes the source."""
        source, facts = host.weights, model.facts
        tensors = model.gguf_tensors(source.tensors)
        self._whole = _Made(host, {tensor.name: tensor for tensor in tensors}, {})
        self._blocks = GgufWeights(self._whole, model, source.tensors)
        everything = dict.fromkeys(facts.moe_layers, tuple(range(facts.n_experts)))
        self._view = PerturbedView(source, model, everything)

    def with_types(self, types: Mapping[str, Type]) -> PerturbedView:
        """The model whose tensors, by their names in GGUF, went through these types."""
        made = replace(self._whole, types=types)
        stored = {slab.stored for name in types for slab in made.of_model[name].slabs}
        return self._view.with_values(self._blocks.of(made), stored)
