"""FP8: a byte of four bits of exponent and three of mantissa, and a scale for each block.

The layout of DeepSeek-V3 and Qwen3-FP8 (`weight_scale_inv`, which in spite of its name is
multiplied), and the FP8 of compressed-tensors (`weight_scale`): both multiply in the same way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from reap2gguf.checkpoint.quantized.coded import CodedWeight, Grid

if TYPE_CHECKING:
    from reap2gguf.checkpoint.weights import Floats, Weights

STORED_AS = "F8_E4M3"


def _meanings() -> Floats:
    """What each byte stands for: E4M3 without infinities, in which S.1111.111 alone is NaN."""
    codes = np.arange(256)
    exponent, mantissa = (codes >> 3) & 15, (codes & 7).astype(np.float32)
    normal = np.ldexp(1 + mantissa / 8, exponent - 7)
    values = np.where(exponent == 0, np.ldexp(mantissa / 8, -6), normal)
    values[(codes & 127) == 127] = np.nan
    return np.where(codes >= 128, -values, values).astype(np.float32)


MEANINGS = _meanings()


@dataclass(frozen=True)
class Float8Weight(CodedWeight):
    """A weight in F8_E4M3; `grid` are its scales."""

    kind: ClassVar[str] = "F8_E4M3"
    grid: Grid

    def decode_rows(self, stored: Weights, matrix: int, begin: int, found: Floats) -> None:
        row = matrix * self.rows_per_matrix + begin
        raw = np.empty(found.size, np.uint8)
        stored.read_bytes(self.values, row * self.n_columns, raw)
        np.take(MEANINGS, raw, out=found.reshape(-1), mode="clip")
        self.grid.multiply(stored, matrix, begin, found)

    def codes_of(self, first: int, last: int) -> tuple[int, int]:
        return first * self.n_columns, (last - first) * self.n_columns
