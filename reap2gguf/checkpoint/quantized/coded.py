"""One weight that is stored in several tensors, and its values a range of rows at a time."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import numpy.typing as npt

from reap2gguf.errors import CheckpointError

if TYPE_CHECKING:
    from reap2gguf.checkpoint.weights import Floats, Weights

_VALUES = 2**20  # decoded at a time: 4 MiB as float32


@dataclass(frozen=True)
class CodedWeight(ABC):
    """A weight (R, C) or (E, R, C) as its files have it: codes, scales, and how they multiply.

    Its rows are counted through all of its matrices: row `r` of matrix `e` is row `e * R + r`.
    """

    kind: ClassVar[str]  # what a table calls the type
    dtype: ClassVar[str] = "F32"  # that holds every product of a code and its scale as llama.cpp's
    name: str  # as if it was not quantized
    shape: tuple[int, ...]
    values: str  # the stored tensor of the codes
    others: tuple[str, ...]  # the stored tensors that belong to it too: scales, and a shape

    @property
    def parts(self) -> tuple[str, ...]:
        """All stored tensors that it is made of."""
        return (self.values, *self.others)

    @property
    def n_columns(self) -> int:
        return self.shape[-1]

    @property
    def rows_per_matrix(self) -> int:
        return self.shape[-2]

    @property
    def n_matrices(self) -> int:
        return math.prod(self.shape[:-2])

    def decode(self, stored: Weights, first: int, last: int) -> Floats:
        """Rows [first, last), (last - first, C); every value is the nearest float32.

        Raises CheckpointError for a scale that is not finite, and as `read_bytes` does.
        """
        found = np.empty((last - first, self.n_columns), np.float32)
        for matrix, begin, end in self.by_matrix(first, last):
            at = matrix * self.rows_per_matrix + begin - first
            self.decode_rows(stored, matrix, begin, found[at : at + end - begin])
        return found

    def by_matrix(self, first: int, last: int) -> Iterator[tuple[int, int, int]]:
        """The matrices that rows are in, and which of their rows those are: [begin, end)."""
        while first < last:
            matrix, begin = divmod(first, self.rows_per_matrix)
            end = min(begin + last - first, self.rows_per_matrix)
            yield matrix, begin, end
            first += end - begin

    @abstractmethod
    def decode_rows(self, stored: Weights, matrix: int, begin: int, found: Floats) -> None:
        """Fill `found` with neighbouring rows of one matrix, from row `begin` of it on."""

    @abstractmethod
    def codes_of(self, first: int, last: int) -> tuple[int, int]:
        """First byte and number of bytes, in `values`, of the codes of rows [first, last)."""

    def codes_of_bytes(self, dtype: str, first: int, n_bytes: int) -> tuple[int, int]:
        """The same for bytes [first, first + n_bytes) of the decoded rows as `dtype`."""
        width = self._row_bytes(dtype)
        return self.codes_of(first // width, -(-(first + n_bytes) // width))

    def _row_bytes(self, dtype: str) -> int:
        return self.n_columns * (4 if dtype == "F32" else 2)

    def read_bytes(
        self, stored: Weights, dtype: str, first: int, buffer: npt.NDArray[np.uint8]
    ) -> None:
        """Fill the 1D `buffer` with bytes of the decoded rows as `dtype`, F32 or BF16.

        Memory: 24 MiB, or five float32 rows if that is more, and of MXFP4 the codes of one matrix.
        Raises as `decode` does.
        """
        width = self._row_bytes(dtype)
        step = max(1, _VALUES // self.n_columns)
        position, done = first, 0
        while done < buffer.nbytes:
            row = position // width
            last = min(row + step, -(-(first + buffer.nbytes) // width))
            values = self.decode(stored, row, last)
            rounded = values if dtype == "F32" else to_bfloat16(values)
            raw = rounded.reshape(-1).view(np.uint8)[position - row * width :]
            part = raw[: buffer.nbytes - done]
            buffer[done : done + len(part)] = part
            position, done = position + len(part), done + len(part)


@dataclass(frozen=True)
class Grid:
    """The scales of a weight: one for each block of a matrix, or of all matrices alike."""

    name: str
    block: tuple[int, int]  # rows and columns that a scale is of; the last ones may be fewer
    size: tuple[int, int]  # scales along both
    per_matrix: bool  # whether each matrix has scales of its own

    def multiply(self, stored: Weights, matrix: int, begin: int, rows: Floats) -> None:
        """Multiply rows (n, C) of a matrix, from row `begin` of it on, by their scales.

        Raises CheckpointError for a scale that is not finite.
        """
        height = self.block[0]
        first, last = begin // height, -(-(begin + len(rows)) // height)
        scales = self._read(stored, matrix, first, last)
        if height == 1:
            rows *= self._widened(scales, rows.shape[1])
            return
        for number in range(first, last):
            part = rows[max(number * height - begin, 0) : (number + 1) * height - begin]
            part *= self._widened(scales[number - first : number - first + 1], rows.shape[1])

    def _widened(self, scales: Floats, n_columns: int) -> Floats:
        """The scales of each column: (n, C), or (n, 1) where a scale is of whole rows."""
        if self.size[1] == 1:
            return scales
        return np.repeat(scales, self.block[1], axis=1)[:, :n_columns]

    def _read(self, stored: Weights, matrix: int, first: int, last: int) -> Floats:
        n_columns = self.size[1]
        before = (matrix * self.size[0] if self.per_matrix else 0) + first
        scales = stored.read_values(self.name, before * n_columns, (last - first) * n_columns)
        if not np.isfinite(scales).all():
            raise CheckpointError(
                f"{stored.folder}: scale {self.name!r} holds NaN or infinite values; download the "
                "file again, or quantize the model again"
            )
        return scales.reshape(last - first, n_columns)


def to_bfloat16(values: Floats) -> npt.NDArray[np.uint16]:
    """The nearest bfloat16 of each value, as its bits; of two that are as near, the even one."""
    bits = values.view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    found: npt.NDArray[np.uint16] = (rounded >> np.uint32(16)).astype(np.uint16)
    is_nan = np.isnan(values)
    if is_nan.any():  # a carry would make infinity or a number of it
        found[is_nan] = 0x7FC0
    return found


def pairs_table(low_and_high: Floats) -> npt.NDArray[np.uint64]:
    """For each byte, the two float32 that its halves stand for, side by side as 8 bytes.

    `low_and_high` (16,): what four bits mean. The low half is the first value.
    """
    codes = np.arange(256)
    both = np.stack([low_and_high[codes & 15], low_and_high[codes >> 4]], axis=1)
    return np.ascontiguousarray(both, dtype=np.float32).view(np.uint64).reshape(256)
