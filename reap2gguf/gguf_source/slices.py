"""Which blocks of a GGUF file stay when experts are removed.

The axis of experts is the slowest of a tensor, so an expert's entries are neighbouring rows, of
whole blocks: they are copied as they are. In tensors of one axis, such as a router's bias, they are
single numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from reap2gguf.errors import UnsupportedModelError
from reap2gguf.gguf_files.tensor_types import block_of
from reap2gguf.messages import shown
from reap2gguf.models.description import Expert, Router

if TYPE_CHECKING:
    from pathlib import Path

    from reap2gguf.checkpoint.weights import Weights
    from reap2gguf.gguf_files.blocks import Blocks
    from reap2gguf.gguf_files.reader import GgufHeader, GgufTensorInfo
    from reap2gguf.models.contract import MoeModel
    from reap2gguf.models.description import GgufTensor
    from reap2gguf.pruning.view import PrunedView

_READ_BYTES = 2**22  # at a time


@dataclass(frozen=True)
class Slice:
    """What stays of one tensor of a GGUF file."""

    info: GgufTensorInfo  # of the source
    axis: int = 0  # of experts; all before it have size 1
    entries: tuple[int, ...] | None = None  # on that axis; None: all of the tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of what stays, slowest first."""
        shape = self.info.shape
        if self.entries is None:
            return shape
        return (*shape[: self.axis], len(self.entries), *shape[self.axis + 1 :])

    @property
    def n_bytes(self) -> int:
        """Bytes of what stays."""
        return self.info.n_bytes // self.info.shape[self.axis] * self.shape[self.axis]

    @property
    def is_flat(self) -> bool:
        """Whether an expert has a single number."""
        return self.entries is not None and self.axis == len(self.info.shape) - 1

    def blocks(self, header: GgufHeader) -> Iterator[npt.NDArray[np.uint8]]:
        """The bytes that stay, in order, at most 4 MiB or one row at a time.

        Raises ArtifactError if the file ends before them.
        """
        if self.is_flat:
            assert self.entries is not None
            numbers = header.read(self.info.name).reshape(self.info.shape[self.axis], -1)
            yield numbers[list(self.entries)].reshape(-1)
            return
        step = max(1, _READ_BYTES // self.info.row_bytes)
        for first, last in self._runs():
            for begin in range(first, last, step):
                yield header.read(self.info.name, begin, min(begin + step, last)).reshape(-1)

    def rows(self, header: Blocks, first: int, last: int) -> npt.NDArray[np.uint8]:
        """Rows [first, last) of what stays, as bytes (last - first, bytes of a row)."""
        name = self.info.name
        if self.is_flat:
            assert self.entries is not None
            numbers = header.read(name).reshape(self.info.shape[self.axis], -1)
            return numbers[list(self.entries)].reshape(1, -1)[first:last]
        if self.entries is None:
            return header.read(name, first, last)
        each = prod(self.info.shape[:-1]) // self.info.shape[self.axis]
        parts = []
        while first < last:
            entry, inside = divmod(first, each)
            count = min(last - first, each - inside)
            begin = self.entries[entry] * each + inside
            parts.append(header.read(name, begin, begin + count))
            first += count
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _runs(self) -> Iterator[tuple[int, int]]:
        """Rows [first, last) that stay; neighbouring experts are one run."""
        n_rows = prod(self.info.shape[:-1])
        if self.entries is None:
            yield 0, n_rows
            return
        each = n_rows // self.info.shape[self.axis]
        begin = previous = self.entries[0]
        for entry in (*self.entries[1:], None):
            if entry is not None and entry == previous + 1:
                previous = entry
                continue
            yield begin * each, (previous + 1) * each
            if entry is not None:
                begin = previous = entry


@dataclass(frozen=True)
class SlicedBlocks:
    """The tensors of a GGUF file as far as they stay, read from that file."""

    source: Blocks
    slices: Mapping[str, Slice]

    @property
    def path(self) -> Path:
        return self.source.path

    @cached_property
    def tensors(self) -> Mapping[str, GgufTensorInfo]:
        """Each with its shape and size; where they begin is not known."""
        return {
            name: replace(one.info, shape=one.shape, n_bytes=one.n_bytes, offset=0)
            for name, one in self.slices.items()
        }

    def read(self, name: str, first: int = 0, last: int | None = None) -> npt.NDArray[np.uint8]:
        """Rows [first, last) of what stays of one tensor, as bytes (n_rows, row_bytes)."""
        one = self.slices[name]
        return one.rows(self.source, first, prod(one.shape[:-1]) if last is None else last)


def slices_of(source: Weights, view: PrunedView) -> dict[str, Slice]:
    """What stays of each tensor, by name, in the file's order; tensors that are dropped are not in.

    `source` are the weights of a GGUF file, of which `view` is a view. Raises UnsupportedModelError
    for a tensor whose experts are not rows of whole blocks.
    """
    model, header = view.source_model, source.blocks
    assert header is not None
    tensors = {one.name: one for one in model.gguf_tensors(source.tensors)}
    expected = {one.name: one.shape for one in view.model.gguf_tensors(view.tensors)}
    found: dict[str, Slice] = {}
    for name, info in header.tensors.items():
        if name not in tensors:
            continue  # of a block that is dropped
        one = _slice(tensors[name], info, model, view)
        if prod(one.shape) != prod(expected[name]):
            raise UnsupportedModelError(
                f"{header.path}: tensor {shown(name)} would have the shape {list(one.shape)} "
                f"after pruning, expected {list(expected[name])}; prune the safetensors instead"
            )
        found[name] = one
    return found


def _slice(tensor: GgufTensor, info: GgufTensorInfo, model: MoeModel, view: PrunedView) -> Slice:
    if tensor.made is not None:
        return Slice(info)
    role = model.role(tensor.slabs[0].stored)
    if not isinstance(role, Expert | Router):
        return Slice(info)
    n_experts = model.facts.n_experts
    axis = next((at for at, size in enumerate(info.shape) if size != 1), len(info.shape) - 1)
    in_blocks = axis == len(info.shape) - 1 and block_of(info.tensor_type)[0] > 1
    if info.shape[axis] != n_experts or in_blocks:
        raise UnsupportedModelError(
            f"{model.reader.where}: tensor {shown(info.name)} ({info.tensor_type.name}, "
            f"{list(info.shape)}) cannot be cut by experts, expected {n_experts} rows of whole "
            "blocks; prune the safetensors instead"
        )
    return Slice(info, axis, view.kept[role.layer])


def n_slice_bytes(slices: Mapping[str, Slice]) -> int:
    """Bytes of all that stays."""
    return sum(one.n_bytes for one in slices.values())
