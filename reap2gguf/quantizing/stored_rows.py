"""Rows as a checkpoint stores them: a part of them is float32 only where it is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from reap2gguf.checkpoint.weights import NUMPY_TYPES, to_float32

if TYPE_CHECKING:
    from reap2gguf.ggml import Floats

Part = slice | npt.NDArray[np.bool_] | npt.NDArray[np.intp]


@dataclass(frozen=True)
class StoredRows:
    """Rows (R, C) of F32, F16 or BF16; `rows[first:last, a:b]` are float32, as of an array."""

    raw: npt.NDArray[np.generic]  # BF16 as the bits, uint16
    dtype: str

    @classmethod
    def of(cls, data: npt.NDArray[np.uint8], dtype: str, n_columns: int) -> StoredRows:
        """Rows whose bytes are `data`, which must not change while they are used."""
        return cls(data.view(NUMPY_TYPES[dtype]).reshape(-1, n_columns), dtype)

    @property
    def shape(self) -> tuple[int, int]:
        n_rows, n_columns = self.raw.shape
        return n_rows, n_columns

    def __getitem__(self, key: Part | tuple[Part, Part]) -> Floats:
        return to_float32(self.raw[key], self.dtype, "")

    def part(self, rows: slice) -> StoredRows:
        """Some neighbouring rows, still as they are stored."""
        return StoredRows(self.raw[rows], self.dtype)

    @property
    def values(self) -> Floats:
        """All of them."""
        return self[:]

    @property
    def largest(self) -> float:
        """The largest |x|; infinity if there is infinity or NaN, and 0 if there are no values.

        The bits of floats have the order of their sizes, so nothing is widened or copied.
        """
        if not self.raw.size:
            return 0.0
        size = self.raw.dtype.itemsize
        bits, sign = self.raw.view(f"<u{size}"), 1 << (8 * size - 1)
        most = max(int(bits.view(f"<i{size}").max()), 0)  # of those without a sign
        most_negative = int(bits.max())
        if most_negative >= sign:
            most = max(most, most_negative - sign)
        largest = to_float32(np.array([most], bits.dtype).view(self.raw.dtype), self.dtype, "")[0]
        return float(largest) if np.isfinite(largest) else float("inf")
