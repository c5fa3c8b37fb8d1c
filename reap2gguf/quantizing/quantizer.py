"""Quantizing rows: by the compiled kernels where there are some, by libggml otherwise.

libggml is the truth. A kernel is used for a type only after it made the same bytes as libggml of a
few rows, once per process (`self_tests.py`). Rows that leave its plain range are given to libggml,
and libggml makes a share of all blocks again, which are compared. On arm64 libggml itself rounds
otherwise: there nothing is compared, and the kernels make the bytes of x86-64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from reap2gguf.errors import DependencyError
from reap2gguf.ggml import Bytes, Floats, Ggml, load_ggml
from reap2gguf.options import CheckQuants
from reap2gguf.quantizing.kernels.codebooks import codebook
from reap2gguf.quantizing.kernels.compiled import VARIABLE, load_kernels
from reap2gguf.quantizing.kernels.compiling import machine
from reap2gguf.quantizing.self_tests import self_tests_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from reap2gguf.quantizing.kernels.codebooks import Tables
    from reap2gguf.quantizing.stored_rows import StoredRows

SAMPLE = CheckQuants.SAMPLE.share  # of the blocks that a kernel makes
_SUPER_BLOCK = 256  # values that no type quantizes apart, but for those that weigh by whole rows
# With importance, their blocks depend on the whole row.
_BY_ROW = frozenset(GGMLQuantizationType[name] for name in ("Q4_0", "Q4_1", "Q5_0", "Q5_1"))
_SAMPLED_ROWS = 8  # that are compared together
_TRIED_ROWS, _TRIED_COLUMNS = 48, 512
_READ_ROWS = 64  # of random bytes


class BlockKernels(Protocol):
    """What makes ggml's blocks faster than libggml: compiled for the processor, or a GPU."""

    def covers(self, tensor_type: GGMLQuantizationType, /) -> bool:
        """Whether it quantizes to this type."""

    def quantize(
        self,
        rows: Floats | StoredRows,
        tensor_type: GGMLQuantizationType,
        importance: Floats | None,
        tables: Tables | None,
        /,
    ) -> tuple[Bytes, npt.NDArray[np.bool_]]:
        """Rows (R, C) as (R, bytes of a row), and which rows (R,) libggml must make instead."""


class BlockReader(Protocol):
    """What makes float32 of ggml's blocks faster than libggml."""

    def reads(self, tensor_type: GGMLQuantizationType, /) -> bool:
        """Whether it reads this type."""

    def dequantize(
        self, raw: Bytes, tensor_type: GGMLQuantizationType, codebook: Bytes | None, /
    ) -> Floats:
        """Rows (R, bytes of a row) as values (R, C)."""


@dataclass
class Quantizer:
    """What makes blocks of rows, and rows of blocks. Threads may share one."""

    ggml: Ggml
    kernels: BlockKernels | None
    checked: float = SAMPLE  # share of the blocks that libggml makes again: 0 to 1
    reader: BlockReader | None = None

    @property
    def is_reference(self) -> bool:
        """Whether this machine's libggml makes the bytes that are expected everywhere."""
        return machine() == "x86_64"

    def quantize(
        self,
        rows: Floats | StoredRows,
        tensor_type: GGMLQuantizationType,
        importance: Floats | None = None,
    ) -> Bytes:
        """Rows (R, C) of float32, or as stored, as `tensor_type`: (R, bytes of a row).

        `importance` is (C,): the mean square of what multiplies each column. Raises ValueError as
        `Ggml.quantize` does, and DependencyError if a block is not what libggml makes.
        """
        self.ggml.check_request(rows.shape, tensor_type, importance)
        if self.kernels is None or not self.uses_kernel(tensor_type, importance is not None):
            return self.ggml.quantize(rows[:], tensor_type, importance)
        target, is_odd = self._by_kernel(self.kernels, rows, tensor_type, importance)
        if is_odd.any():
            target[is_odd] = self.ggml.quantize(rows[is_odd], tensor_type, importance)
        self.compare(rows, target, tensor_type, importance)
        return target

    def uses_kernel(self, tensor_type: GGMLQuantizationType, is_weighted: bool) -> bool:
        """Whether a kernel does this type, with importance or without."""
        if self.kernels is None or not self.kernels.covers(tensor_type):
            return False
        if not self.is_reference:
            return True
        return self_tests_of(self.kernels).passes(
            ("makes", self.ggml, tensor_type, is_weighted),
            lambda: self._is_equal(tensor_type, is_weighted),
        )

    def _is_equal(self, tensor_type: GGMLQuantizationType, is_weighted: bool) -> bool:
        """Whether the kernel makes libggml's bytes of a few random rows."""
        assert self.kernels is not None
        random = np.random.default_rng(0)
        shape = _TRIED_ROWS, _TRIED_COLUMNS
        rows = random.standard_t(4, shape).astype(np.float32)
        importance = random.gamma(1, 1, shape[1]).astype(np.float32) if is_weighted else None
        found, is_odd = self._by_kernel(self.kernels, rows, tensor_type, importance)
        wanted = self.ggml.quantize(rows, tensor_type, importance)
        return bool((found == wanted)[~is_odd].all() and not is_odd.all())

    def _by_kernel(
        self,
        kernels: BlockKernels,
        rows: Floats | StoredRows,
        tensor_type: GGMLQuantizationType,
        importance: Floats | None,
    ) -> tuple[Bytes, npt.NDArray[np.bool_]]:
        book = codebook(self.ggml, tensor_type)
        tables = None if book is None else book.pointers()
        return kernels.quantize(rows, tensor_type, importance, tables)

    def compare(
        self,
        rows: Floats | StoredRows,
        target: Bytes,
        tensor_type: GGMLQuantizationType,
        importance: Floats | None,
    ) -> None:
        """Raise DependencyError if a sampled block is not what libggml makes.

        Samples none where libggml rounds otherwise, or if none are asked for.
        """
        if not self.is_reference or not self.checked:
            return
        block, size = GGML_QUANT_SIZES[tensor_type]
        by_row = tensor_type in _BY_ROW and importance is not None
        width = rows.shape[1] if by_row or rows.shape[1] % _SUPER_BLOCK else _SUPER_BLOCK
        for some, first in _sampled(rows.shape, width, self.checked):
            columns = slice(first, first + width)
            raw = slice(first // block * size, (first + width) // block * size)
            weights = None if importance is None else importance[columns]
            wanted = self.ggml.quantize(rows[some, columns], tensor_type, weights)
            if not np.array_equal(wanted, target[some, raw]):
                raise DependencyError(
                    f"{tensor_type.name}: the compiled kernel and libggml ({self.ggml.path}) make "
                    "different bytes of the same values; set "
                    f"{VARIABLE}=off, run the command again with --fresh, and report it"
                )

    def dequantize(self, raw: Bytes, tensor_type: GGMLQuantizationType) -> Floats:
        """The float32 values (R, C) of rows (R, bytes of a row) stored as `tensor_type`."""
        if self.reader is None or not self.reads_by_kernel(tensor_type):
            return self.ggml.dequantize(raw, tensor_type)
        return self._read_by(self.reader, raw, tensor_type)

    def reads_by_kernel(self, tensor_type: GGMLQuantizationType) -> bool:
        """Whether a kernel reads blocks of this type."""
        if (reader := self.reader) is None:
            return False
        return self_tests_of(reader).passes(
            ("reads", self.ggml, tensor_type), lambda: self._reads_equally(reader, tensor_type)
        )

    def _reads_equally(self, reader: BlockReader, tensor_type: GGMLQuantizationType) -> bool:
        """Whether a kernel makes the values that libggml does, of random bytes.

        All but NaN must have the same bits; a scale that is NaN may make another NaN.
        """
        if not reader.reads(tensor_type):
            return False
        size = int(GGML_QUANT_SIZES[tensor_type][1])
        raw = np.random.default_rng(0).integers(0, 256, (_READ_ROWS, 4 * size), dtype=np.uint8)
        found = self._read_by(reader, raw, tensor_type)
        wanted = self.ggml.dequantize(raw, tensor_type)
        same = found.view(np.uint32) == wanted.view(np.uint32)
        return bool((same | (np.isnan(found) & np.isnan(wanted))).all())

    def _read_by(
        self, reader: BlockReader, raw: Bytes, tensor_type: GGMLQuantizationType
    ) -> Floats:
        book = codebook(self.ggml, tensor_type)
        return reader.dequantize(raw, tensor_type, None if book is None else book.entries)

    def check_precision(
        self,
        rows: Floats,
        target: Bytes,
        tensor_type: GGMLQuantizationType,
        importance: Floats | None = None,
    ) -> None:
        """Raise ValueError as `Ggml.check_precision` does."""
        self.ggml.check_precision(rows, target, tensor_type, importance)


def _sampled(shape: Sequence[int], width: int, share: float) -> list[tuple[slice, int]]:
    """Rows and first column of blocks spread over rows (R, C), at least one if there are any.

    Some neighbouring rows are taken together, so that many blocks cost few calls.
    """
    n_rows, per_row = shape[0], shape[1] // width
    wanted = min(n_rows * per_row, max(1, round(n_rows * per_row * share)))
    height = min(_SAMPLED_ROWS, wanted, n_rows)
    per_column = -(-n_rows // height)  # groups of rows
    total, count = per_row * per_column, -(-wanted // height)
    # a step that is no multiple of a row's blocks, so that all columns have their turn
    numbers = (int((k + 0.37) * total / count) for k in range(count))
    places = ((number // per_row * height, number % per_row * width) for number in numbers)
    return [(slice(row, min(row + height, n_rows)), first) for row, first in places]


def load_quantizer(checked: float = SAMPLE) -> Quantizer:
    """The quantizer of this machine. Raises DependencyError without a libggml."""
    kernels = load_kernels()
    return Quantizer(load_ggml(), kernels, checked, kernels)
