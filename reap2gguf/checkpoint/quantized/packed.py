"""Whole numbers of four or eight bits in words of 32: "pack-quantized" of compressed-tensors.

`weight_packed` (R, words) I32 has a row's numbers from the lowest bits of each word on, with half
of their range added so that none is negative; `weight_scale` (R, groups) has a scale for each group
of neighbouring columns; `weight_shape` (2,) says R and C.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from reap2gguf.checkpoint.quantized.coded import CodedWeight, Grid, pairs_table
from reap2gguf.errors import CheckpointError

if TYPE_CHECKING:
    from reap2gguf.checkpoint.weights import Floats, Weights

WORD_BYTES = 4
_PAIRS = pairs_table(np.arange(16, dtype=np.float32) - 8)


@dataclass(frozen=True)
class PackedWeight(CodedWeight):
    """A weight in whole numbers; `grid` are its scales, `shape_name` the tensor of its shape."""

    kind: ClassVar[str] = "INT4"
    grid: Grid
    bits: int
    shape_name: str

    @property
    def row_bytes(self) -> int:
        """Bytes of a row of words, whose last one may not be full."""
        per_word = 8 * WORD_BYTES // self.bits
        return -(-self.n_columns // per_word) * WORD_BYTES

    def decode_rows(self, stored: Weights, matrix: int, begin: int, found: Floats) -> None:
        if begin == 0:
            self._check_shape(stored)
        raw = np.empty(len(found) * self.row_bytes, np.uint8)
        stored.read_bytes(self.values, begin * self.row_bytes, raw)
        if self.bits == 4:
            values = np.take(_PAIRS, raw).view(np.float32).reshape(len(found), -1)
        else:
            values = raw.astype(np.float32).reshape(len(found), -1) - np.float32(128)
        found[...] = values[:, : self.n_columns]
        self.grid.multiply(stored, matrix, begin, found)

    def codes_of(self, first: int, last: int) -> tuple[int, int]:
        return first * self.row_bytes, (last - first) * self.row_bytes

    def _check_shape(self, stored: Weights) -> None:
        said = stored.read(self.shape_name).tolist()
        if said != list(self.shape):
            raise CheckpointError(
                f"{stored.folder}: {self.shape_name!r} is {said}, expected {list(self.shape)}, as "
                f"{self.values!r} and its scales have it; download the file again"
            )
