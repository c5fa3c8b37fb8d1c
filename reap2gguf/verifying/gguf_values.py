"""Compares the values of a GGUF file with the weights that it was made from, row by row.

Blocks of types that are cheap to make are made again, by the export's own code, and compared by
bytes; with `Exactness.every_type` those of all types are. The others are dequantized and must be
within the bounds of `matrices.py`.

Memory: a thread holds one range of rows, at most 16 MiB as float32, three times, and its bytes.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING

import numpy as np
from gguf import GGMLQuantizationType

from reap2gguf.errors import Reap2ggufError
from reap2gguf.exporting.row_ranges import (
    Batch,
    BlockMaker,
    RowRange,
    batches,
    check_imatrix,
    work_through,
)
from reap2gguf.ggml import NEEDS_IMPORTANCE, STORABLE
from reap2gguf.gguf_files.rows import MAX_VALUES, read_rows
from reap2gguf.models.description import is_rounded
from reap2gguf.quantizing.quantizer import load_quantizer
from reap2gguf.verifying.exactness import EXACT_TYPES
from reap2gguf.verifying.matrices import (
    RowErrors,
    bound_of,
    errs_no_more,
    is_beyond_its_type,
    range_bound,
    relative_error,
)

if TYPE_CHECKING:
    import numpy.typing as npt

    from reap2gguf.checkpoint.weights import Floats, Weights
    from reap2gguf.gguf_files.reader import GgufHeader, GgufTensorInfo
    from reap2gguf.models.description import GgufTensor
    from reap2gguf.progress import Progress
    from reap2gguf.quantizing.quantizer import Quantizer
    from reap2gguf.verifying.exactness import Exactness

_MAX_ROW = 2**22  # values; a row is read at once
_OTHER_LIBRARY = 1.5  # another libggml may round otherwise, and errs at most this much more
_EVEN_IMPORTANCE = 1.2  # of a sparse row, over quantizing it with even importance
_MOST_LAST_BITS = 2  # by which exponentials of two processors differ


def check_values(header: GgufHeader, n_threads: int, progress: Progress) -> Iterator[str]:
    """Violations without weights to compare with: NaN and infinity."""
    quantizer = load_quantizer()

    def check(info: GgufTensorInfo) -> str | None:
        where = f"{header.path.name}: {info.name}"
        if info.tensor_type not in STORABLE:
            return f"{where} is {info.tensor_type.name}, which is not a type for weights"
        if info.shape[-1] > _MAX_ROW:
            return f"{where} has rows of {info.shape[-1]:,} values"
        n_rows = prod(info.shape[:-1])
        step = max(1, MAX_VALUES // info.shape[-1])
        for first in range(0, n_rows, step):
            raw = header.read(info.name, first, min(first + step, n_rows))
            finite = np.isfinite(quantizer.dequantize(raw, info.tensor_type)).all(axis=1)
            if not finite.all():
                matrix = (first + int(np.argmin(finite))) * info.shape[0] // n_rows
                which = f" expert {matrix}" if len(info.shape) == 3 else ""
                return f"{where}{which} holds NaN or infinite values"
        return None

    infos = list(header.tensors.values())
    with (
        progress.task(_title(header), sum(info.n_bytes for info in infos), "bytes") as task,
        ThreadPoolExecutor(n_threads) as pool,
    ):
        for info, violation in zip(infos, pool.map(check, infos), strict=True):
            task.advance(info.n_bytes)
            if violation:
                yield violation


def compare_values(
    header: GgufHeader,
    weights: Weights,
    tensors: Sequence[GgufTensor],
    exactness: Exactness,
    n_threads: int,
    progress: Progress,
) -> Iterator[str]:
    """Violations in the values of tensors whose shapes fit; the first of each tensor."""
    where = header.path.name
    types = {tensor.name: {header.tensors[tensor.name].tensor_type} for tensor in tensors}
    comparable = []
    for tensor in tensors:
        (tensor_type,) = types[tensor.name]
        if tensor_type not in STORABLE:
            yield f"{where}: {tensor.name} is {tensor_type.name}, which is not a type for weights"
        else:
            comparable.append(tensor)
    was_weighted = any(key.startswith("quantize.imatrix.") for key in header.metadata)
    imatrix = exactness.imatrix
    if exactness.every_type and was_weighted and imatrix is None:
        yield (
            f"{where}: was quantized with an importance matrix, which is needed to compare it byte "
            "for byte; pass it"
        )
        return
    if imatrix is not None:
        try:
            check_imatrix(tensors, types, imatrix)
        except Reap2ggufError as error:
            yield f"{where}: {error}"
            return
    quantizer = load_quantizer()
    blocks = BlockMaker(weights, quantizer, imatrix.entries if imatrix else {})
    is_ours = any(key.startswith("reap2gguf.") for key in header.metadata)
    knows_importance = imatrix is not None or (is_ours and not was_weighted)
    comparison = _Comparison(header, quantizer, blocks, exactness, knows_importance)
    total = sum(header.tensors[tensor.name].n_bytes for tensor in comparable)
    with progress.task(_title(header), total, "bytes") as task:

        def work(batch: Batch) -> None:
            for rows in batch:
                comparison.check(rows)
                info = header.tensors[rows.tensor.name]
                task.advance((rows.last - rows.first) * info.row_bytes)

        work_through(work, weights, batches(weights, comparable), n_threads)
    for tensor in comparable:
        if tensor.name in comparison.found:
            yield comparison.found[tensor.name][1]


def _title(header: GgufHeader) -> str:
    return f"Verifying {header.path.name}"


@dataclass(frozen=True)
class _Comparison:
    """Compares ranges of rows from several threads, and keeps each tensor's first violation."""

    header: GgufHeader
    quantizer: Quantizer
    blocks: BlockMaker
    exactness: Exactness
    knows_importance: bool
    found: dict[str, tuple[int, str]] = field(default_factory=dict)  # first row, violation
    lock: threading.Lock = field(default_factory=threading.Lock)

    def check(self, rows: RowRange) -> None:
        name, place = rows.tensor.name, rows.first_in_tensor
        if name in self.found and self.found[name][0] < place:
            return
        try:
            violation = self._compare(rows)
        except Reap2ggufError as error:
            violation = f"{self.header.path.name}: {name}: {error}"
        with self.lock:
            if violation and (name not in self.found or place < self.found[name][0]):
                self.found[name] = place, violation

    def _compare(self, rows: RowRange) -> str | None:
        tensor_type = self.header.tensors[rows.tensor.name].tensor_type
        first = rows.first_in_tensor
        raw = self.header.read(rows.tensor.name, first, first + rows.last - rows.first)
        stored = self.blocks.read(rows)
        values = self.quantizer.dequantize(raw, tensor_type)
        errors = RowErrors.of(values, stored)
        if self.exactness.every_type or tensor_type in EXACT_TYPES:
            violation = self._compare_bytes(rows, raw, stored, tensor_type)
        else:
            violation = self._compare_rows(rows, raw, stored, tensor_type, errors)
        if violation is None and is_beyond_its_type(errors, stored, tensor_type):
            limit = (
                f"expected at most {range_bound(tensor_type):.1%} for {tensor_type.name}; the type "
                "loses these values, choose another one for this tensor"
            )
            found = f"differs from {rows.slab.stored} by {errors.relative():.1%}"
            violation = f"{self._where(rows)} {found}, {limit}"
        return violation

    def _compare_rows(
        self,
        rows: RowRange,
        raw: npt.NDArray[np.uint8],
        stored: Floats,
        tensor_type: GGMLQuantizationType,
        errors: RowErrors,
    ) -> str | None:
        """The violation of the first row that is beyond its bounds and not made by quantizing."""
        for row in errors.suspicious(tensor_type, self.knows_importance):
            one = slice(row, row + 1)
            if not self._is_sound(rows, raw[one], stored[one], tensor_type):
                bound = bound_of(tensor_type, self.knows_importance)
                limit = f"expected at most {bound:.0%} in any 32 values of {tensor_type.name}"
                return self._violation(rows, raw, stored, int(row), tensor_type, limit)
        return None

    def _compare_bytes(
        self,
        rows: RowRange,
        raw: npt.NDArray[np.uint8],
        stored: Floats,
        tensor_type: GGMLQuantizationType,
    ) -> str | None:
        """The violation if a range does not have the bytes that the export makes."""
        wanted = self.blocks.quantize(rows, stored, tensor_type)
        if np.array_equal(raw, wanted):
            return None
        if not self.exactness.every_type and is_rounded(rows.tensor.name):
            values = raw.view(np.int32), wanted.view(np.int32)
            if np.abs(np.subtract(*values, dtype=np.int64)).max() <= _MOST_LAST_BITS:
                return None
        row = int((raw != wanted).any(axis=1).argmax())
        limit = f"expected the bytes that {tensor_type.name} makes of it"
        if tensor_type not in EXACT_TYPES:
            again = self.quantizer.dequantize(wanted, tensor_type)
            values_found = self.quantizer.dequantize(raw, tensor_type)
            made_by = self.exactness.ggml
            if errs_no_more(values_found, again, stored, _OTHER_LIBRARY):
                limit += "; no value errs more than the type does"
                if made_by is not None and made_by != self.quantizer.ggml.label:
                    limit += (
                        f", and the file was made with libggml {made_by}, which may round "
                        f"otherwise than libggml {self.quantizer.ggml.label} here"
                    )
        return self._violation(rows, raw, stored, row, tensor_type, limit)

    def _is_sound(
        self,
        rows: RowRange,
        raw: npt.NDArray[np.uint8],
        stored: Floats,
        tensor_type: GGMLQuantizationType,
    ) -> bool:
        """Whether a row beyond its bound is what quantizing makes of it."""
        found = self.quantizer.dequantize(raw, tensor_type)
        if not np.isfinite(found).all():
            return False
        if not self.knows_importance:
            even = np.ones(stored.shape[1], dtype=np.float32)
            importance = even if tensor_type in NEEDS_IMPORTANCE else None
            again = self.quantizer.quantize(stored, tensor_type, importance)
            values = self.quantizer.dequantize(again, tensor_type)
            return errs_no_more(found, values, stored, _EVEN_IMPORTANCE)
        again = self.blocks.quantize(rows, stored, tensor_type)
        if np.array_equal(raw, again):
            return True
        if self.exactness.ggml == self.quantizer.ggml.label:
            return False
        values = self.quantizer.dequantize(again, tensor_type)
        return errs_no_more(found, values, stored, _OTHER_LIBRARY)

    def _violation(
        self,
        rows: RowRange,
        raw: npt.NDArray[np.uint8],
        stored: Floats,
        row: int,
        tensor_type: GGMLQuantizationType,
        limit: str,
    ) -> str:
        """What is wrong with a range whose row `row` is the first that is not sound."""
        where = self._where(rows)
        values = self.quantizer.dequantize(raw, tensor_type)
        if not np.isfinite(values).all():
            return f"{where} holds NaN or infinite values"
        if not values.any() and stored.any():
            return f"{where} holds only zeros, which {rows.slab.stored} does not"
        error = relative_error(values[row], stored[row])
        place = f" in row {rows.first + row}" if len(rows.tensor.shape) > 1 else ""
        size = f"by {error:.2%}" if stored[row].any() else "where only zeros are stored"
        other = self._likely_expert(rows, values, relative_error(values, stored))
        hint = "" if other is None else f"; it holds the weights of expert {other}"
        return f"{where} differs from {rows.slab.stored}{place} {size}, {limit}{hint}"

    def _where(self, rows: RowRange) -> str:
        """The matrix that a range is of."""
        which = f" expert {rows.matrix}" if len(rows.tensor.shape) == 3 else ""
        return f"{self.header.path.name}: {rows.tensor.name}{which}"

    def _likely_expert(self, rows: RowRange, values: Floats, error: float) -> int | None:
        """Which expert's weights a range holds, when they are not those of its place."""
        best: tuple[float, int] | None = None
        for matrix, slab in enumerate(rows.tensor.slabs):
            if matrix != rows.matrix:
                stored = read_rows(self.blocks.weights, rows.tensor, slab, rows.first, rows.last)
                other = relative_error(values, stored)
                if other < 0.7 * error and (best is None or other < best[0]):
                    best = other, matrix
        return None if best is None else best[1]
