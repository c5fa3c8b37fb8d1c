"""MXFP4 as gpt-oss stores it: 32 numbers of four bits, and one power of two for them.

`_blocks` (E, out, in / 32, 16) U8 has two numbers per byte, the low half first; `_scales`
(E, out, in / 32) U8 is the exponent of each block, with 127 added. transformers has the decoded
weight as (E, in, out), and so has a checkpoint of the same model in BF16: that is its shape here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from reap2gguf.checkpoint.quantized.coded import CodedWeight, pairs_table
from reap2gguf.errors import CheckpointError

if TYPE_CHECKING:
    import numpy.typing as npt

    from reap2gguf.checkpoint.weights import Floats, Weights

BLOCK = 32  # values
BLOCK_BYTES = 16
_POSITIVE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_PAIRS = pairs_table(np.array((*_POSITIVE, *(-value for value in _POSITIVE)), np.float32))
_NOT_A_NUMBER = 255  # among the exponents
# a code times a power of two fits, up to 6 x 2^125
_LARGEST = 127 + 125


@dataclass(frozen=True)
class Mxfp4Weight(CodedWeight):
    """A weight (E, in, out) whose blocks lie along `in`; every value is a bfloat16."""

    kind: ClassVar[str] = "MXFP4"
    dtype: ClassVar[str] = "BF16"
    scales: str

    @property
    def _n_blocks(self) -> int:
        """Blocks of one output."""
        return self.rows_per_matrix // BLOCK

    def decode_rows(self, stored: Weights, matrix: int, begin: int, found: Floats) -> None:
        # an input's values lie in the blocks of all outputs
        first, last = begin // BLOCK, -(-(begin + len(found)) // BLOCK)
        shape = (self.n_columns, self._n_blocks)
        blocks = self._read(stored, self.values, matrix, (*shape, BLOCK_BYTES))[:, first:last]
        exponents = self._read(stored, self.scales, matrix, shape)[:, first:last]
        check_exponents(exponents, stored, self.scales)
        values = np.take(_PAIRS, np.ascontiguousarray(blocks)).view(np.float32)
        powers = np.ldexp(np.float32(1), exponents.astype(np.int32) - 127)
        values = (values * powers[..., None]).reshape(self.n_columns, -1)
        found[...] = values[:, begin - first * BLOCK :][:, : len(found)].T

    def _read(
        self, stored: Weights, name: str, matrix: int, shape: tuple[int, ...]
    ) -> npt.NDArray[np.uint8]:
        """The bytes of one matrix."""
        raw = np.empty(shape, np.uint8)
        stored.read_bytes(name, matrix * raw.size, raw.reshape(-1))
        return raw

    def codes_of(self, first: int, last: int) -> tuple[int, int]:
        size = self.n_columns * self._n_blocks * BLOCK_BYTES
        begin, end = first // self.rows_per_matrix, -(-last // self.rows_per_matrix)
        return begin * size, (end - begin) * size


def check_exponents(exponents: npt.NDArray[np.uint8], stored: Weights, name: str) -> None:
    """Raise CheckpointError for exponents of which no code makes a bfloat16."""
    most = int(exponents.max(initial=0))
    if most > _LARGEST:
        what = "NaN" if most == _NOT_A_NUMBER else "beyond a bfloat16"
        raise CheckpointError(
            f"{stored.folder}: scale {name!r} holds {most}, which is {what}, expected at most "
            f"{_LARGEST}; download the file again, or quantize the model again"
        )
