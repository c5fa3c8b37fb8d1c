"""Reads the matrices that a GGUF tensor is made of, a range of whole rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from reap2gguf.checkpoint.weights import Weights
    from reap2gguf.models.description import GgufTensor, Slab

MAX_VALUES = 2**22  # in a range of rows: 16 MiB as float32
_FLOATS = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class StoredBytes:
    """Bytes [first, first + count) of a stored tensor, which are values of `dtype`."""

    name: str
    dtype: str
    first: int
    count: int


def rows_per_matrix(tensor: GgufTensor) -> int:
    """Rows of each of a tensor's matrices."""
    return prod(tensor.shape[:-1]) // len(tensor.slabs)


def row_ranges(tensor: GgufTensor) -> Iterator[tuple[int, int]]:
    """Ranges [first, last) that cover a matrix; a single one if they need all that is stored."""
    n_rows = rows_per_matrix(tensor)
    is_transformed = tensor.transform is not None and _picked_rows(tensor) is None
    is_whole = is_transformed or any(slab.transposed for slab in tensor.slabs[:1])
    step = n_rows if is_whole else max(1, MAX_VALUES // tensor.n_columns)
    for first in range(0, n_rows, step):
        yield first, min(first + step, n_rows)


def read_rows(
    weights: Weights, tensor: GgufTensor, slab: Slab, first: int, last: int
) -> npt.NDArray[np.float32]:
    """Rows [first, last) of one matrix, (last - first, columns), as GGUF is to hold them."""
    if tensor.made is not None:
        values = np.array(tensor.made, np.float32)
        return values.reshape(-1, tensor.n_columns)[first:last]
    runs = _runs(tensor, slab, first, last)
    parts = [weights.read_float32(slab.stored, *run, slab.index) for run in runs]
    values = parts[0] if len(parts) == 1 else np.concatenate(parts)
    if _picked_rows(tensor) is not None:
        return values
    if tensor.transform is not None:
        return tensor.transform(values).reshape(-1, tensor.n_columns)[first:last]
    if slab.transposed:
        low, high = slab.rows or (0, values.shape[1])
        return np.ascontiguousarray(values[:, low : high : slab.step].T[first:last])
    if slab.step > 1:
        return np.ascontiguousarray(values[:: slab.step])
    return values.reshape(1, -1) if len(tensor.shape) == 1 else values


def stored_bytes(
    weights: Weights, tensor: GgufTensor, slab: Slab, first: int, last: int
) -> StoredBytes | None:
    """Where rows [first, last) lie side by side, as GGUF is to hold them.

    None if they do not, or are no floats: then `read_rows` makes them of what is stored.
    """
    stored = weights.tensors.get(slab.stored)
    if stored is None or tensor.transform is not None or slab.transposed or slab.step > 1:
        return None
    shape = stored.shape if slab.index is None else stored.shape[1:]
    if stored.dtype not in _FLOATS or len(shape) != 2 or shape[1] != tensor.n_columns:
        return None
    begin, end = _stored_rows(tensor, slab, first, last)
    if len(tensor.shape) == 1 or end is None:
        return None
    row = (slab.index or 0) * shape[0] + begin
    width = shape[1] * stored.item_bytes
    return StoredBytes(slab.stored, stored.dtype, row * width, (end - begin) * width)


def expect_rows(weights: Weights, tensor: GgufTensor, slab: Slab, first: int, last: int) -> None:
    """Prefetch what `read_rows` will read; returns at once."""
    if tensor.made is not None:
        return
    for begin, end in _runs(tensor, slab, first, last):
        weights.expect(slab.stored, begin, end, slab.index)


def _picked_rows(tensor: GgufTensor) -> npt.NDArray[np.int64] | None:
    """Which stored row each row of a matrix is, where a transform does no more than pick them."""
    if tensor.transform is None or len(tensor.shape) == 1:
        return None
    return tensor.transform.rows


def _runs(tensor: GgufTensor, slab: Slab, first: int, last: int) -> list[tuple[int, int | None]]:
    """Where the stored rows begin and end that rows [first, last) are made of, run by run."""
    picked = _picked_rows(tensor)
    if picked is None:
        return [_stored_rows(tensor, slab, first, last)]
    chosen = picked[first:last] + (slab.rows[0] if slab.rows else 0)
    breaks = np.flatnonzero(np.diff(chosen) != 1) + 1
    return [(int(run[0]), int(run[-1]) + 1) for run in np.split(chosen, breaks)]


def _stored_rows(tensor: GgufTensor, slab: Slab, first: int, last: int) -> tuple[int, int | None]:
    """Where rows [first, last) begin and end in what is stored.

    A transform needs all of it, and so do rows that are stored as columns.
    """
    if slab.transposed:
        return slab.columns or (0, None)
    if len(tensor.shape) == 1:
        return 0, None
    if tensor.transform is not None:
        return slab.rows or (0, None)
    shift = slab.rows[0] if slab.rows else 0
    return first * slab.step + shift, (last - 1) * slab.step + shift + 1
