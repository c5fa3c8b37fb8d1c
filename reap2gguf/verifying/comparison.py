"""One GGUF file against ranges of the weights that it was made from.

A range's blocks are made again, by the export's own code, and compared by bytes. That finds every
changed bit, but no fault of the quantizer: so a sample of the rows is dequantized too, and must be
as near to the weights as its type allows. Where blocks are not made again, or differ and may, all
rows are dequantized and must be within the bounds of `matrices.py`.

Memory: of a range as float32, at most five times its size, and its bytes twice.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from reap2gguf.errors import DependencyError, Reap2ggufError
from reap2gguf.ggml import NEEDS_IMPORTANCE
from reap2gguf.gguf_files.rows import read_rows
from reap2gguf.models.description import is_rounded
from reap2gguf.verifying.exactness import EXACT_TYPES, QUICK_TYPES
from reap2gguf.verifying.matrices import (
    RowErrors,
    bound_of,
    errs_no_more,
    is_beyond_its_type,
    is_within_its_type,
    range_bound,
    relative_error,
)

if TYPE_CHECKING:
    import numpy.typing as npt
    from gguf import GGMLQuantizationType

    from reap2gguf.checkpoint.weights import Floats
    from reap2gguf.exporting.row_ranges import BlockMaker, RowRange
    from reap2gguf.gguf_files.reader import GgufHeader
    from reap2gguf.quantizing.quantizer import Quantizer
    from reap2gguf.verifying.exactness import Exactness

    Bytes = npt.NDArray[np.uint8]

_OTHER_LIBRARY = 1.5  # another libggml may round otherwise, and errs at most this much more
_EVEN_IMPORTANCE = 1.2  # of a sparse row, over quantizing it with even importance
_MOST_LAST_BITS = 2  # by which exponentials of two processors differ
_SAMPLED_VALUES = 2**17  # of a range whose bytes are equal


def are_equal(one: Bytes, other: Bytes) -> bool:
    """Whether two contiguous arrays have the same shape and bytes. Memory: an eighth of one."""
    if one.shape != other.shape:
        return False
    flat = one.reshape(-1), other.reshape(-1)
    whole = one.size // 8 * 8  # eight bytes at a time
    words, others = (part[:whole].view(np.uint64) for part in flat)
    return np.array_equal(words, others) and np.array_equal(flat[0][whole:], flat[1][whole:])


def sample_step(n_values: int) -> int:
    """Of how many rows of a range one is dequantized where all bytes are equal."""
    return max(1, n_values // _SAMPLED_VALUES)


@dataclass
class Original:
    """A range as the source has it, and its blocks: each type's are made once for all files."""

    rows: RowRange
    maker: BlockMaker  # which reads it
    _made: tuple[BlockMaker, GGMLQuantizationType, Bytes] | None = None  # the last ones

    @cached_property
    def stored(self) -> Floats:
        """Its values (rows, columns). Raises as `BlockMaker.read` does."""
        return self.maker.read(self.rows)

    def blocks(self, maker: BlockMaker, tensor_type: GGMLQuantizationType) -> Bytes:
        """Its bytes (rows, bytes of a row), as the export makes them."""
        if self._made is None or self._made[0] is not maker or self._made[1] is not tensor_type:
            if self.rows.tensor.is_sliced_as(tensor_type):
                made = self.rows.blocks(maker.weights)
            else:
                made = maker.quantize(self.rows, self.stored, tensor_type)
            self._made = maker, tensor_type, made
        return self._made[2]


@dataclass(frozen=True)
class Comparison:
    """Compares ranges of rows from several threads, and keeps each tensor's first violation."""

    header: GgufHeader
    blocks: BlockMaker
    exactness: Exactness
    knows_importance: bool
    found: dict[str, tuple[int, str]] = field(default_factory=dict)  # first row, violation
    bounded: set[GGMLQuantizationType] = field(default_factory=set)  # not all of it exact
    differing: set[GGMLQuantizationType] = field(default_factory=set)  # in bytes, within bounds
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def quantizer(self) -> Quantizer:
        return self.blocks.quantizer

    def type_of(self, rows: RowRange) -> GGMLQuantizationType:
        """The type of a range in this file."""
        return self.header.tensors[rows.tensor.name].tensor_type

    def wants(self, rows: RowRange) -> bool:
        """Whether a range can hold the first violation of its tensor."""
        found = self.found.get(rows.tensor.name)
        return found is None or found[0] >= rows.first_in_tensor

    def check(self, original: Original) -> None:
        """Compare a range. Raises DependencyError if the quantizer is at fault."""
        try:
            violation = self._compare(original)
        except DependencyError:
            raise
        except Reap2ggufError as error:
            self.fail(original.rows, error)
        else:
            if violation:
                self._keep(original.rows, violation)

    def fail(self, rows: RowRange, error: Reap2ggufError) -> None:
        """Keep what prevents a range from being compared."""
        self._keep(rows, f"{self.header.path.name}: {rows.tensor.name}: {error}")

    def _keep(self, rows: RowRange, violation: str) -> None:
        with self._lock:
            if self.wants(rows):
                self.found[rows.tensor.name] = rows.first_in_tensor, violation

    def _compare(self, original: Original) -> str | None:
        rows = original.rows
        tensor_type, first = self.type_of(rows), rows.first_in_tensor
        raw = self.header.read(rows.tensor.name, first, first + rows.last - rows.first)
        if rows.tensor.is_sliced_as(tensor_type):
            if are_equal(raw, original.blocks(self.blocks, tensor_type)):
                is_finite = self.quantizer.ggml.is_finite(raw, tensor_type)
                return None if is_finite else f"{self._where(rows)} holds NaN or infinite values"
            if self.exactness.every_type or self.exactness.tries_bytes:
                return self._not_the_source(original, raw, tensor_type)
        stored = original.stored
        if self._must_be_equal(tensor_type):
            violation = self._compare_bytes(original, raw, tensor_type)
            return violation or self._compare_sample(rows, raw, stored, tensor_type)
        if self._tries(tensor_type):
            if self._has_equal_bytes(original, raw, tensor_type):
                return self._compare_sample(rows, raw, stored, tensor_type)
            self.differing.add(tensor_type)
        self.bounded.add(tensor_type)
        errors = RowErrors.of(self.quantizer.dequantize(raw, tensor_type), stored)
        violation = self._compare_rows(rows, raw, stored, tensor_type, errors)
        return violation or self._compare_range(rows, stored, tensor_type, errors)

    def makes_again(self, tensor_type: GGMLQuantizationType) -> bool:
        """Whether blocks of a type are made again, and compared by bytes."""
        return self._must_be_equal(tensor_type) or self._tries(tensor_type)

    def _must_be_equal(self, tensor_type: GGMLQuantizationType) -> bool:
        return self.exactness.every_type or tensor_type in EXACT_TYPES

    def _tries(self, tensor_type: GGMLQuantizationType) -> bool:
        """Whether blocks are made again although they may be others.

        Not any more once some differ: most others would too, and cost time.
        """
        return (
            self.exactness.tries_bytes
            and self.knows_importance
            and tensor_type in QUICK_TYPES
            and tensor_type not in self.differing
            and self.quantizer.uses_kernel(tensor_type, self.exactness.imatrix is not None)
        )

    def _has_equal_bytes(
        self, original: Original, raw: Bytes, tensor_type: GGMLQuantizationType
    ) -> bool:
        try:
            return are_equal(raw, original.blocks(self.blocks, tensor_type))
        except DependencyError:
            raise
        except Reap2ggufError:  # beyond the type's range: it was made in another way
            return False

    def _compare_sample(
        self, rows: RowRange, raw: Bytes, stored: Floats, tensor_type: GGMLQuantizationType
    ) -> str | None:
        """The violation if quantizing lost the values; all are compared if some seem lost."""
        step = sample_step(stored.size)
        found = self.quantizer.dequantize(raw[::step], tensor_type)
        if is_within_its_type(found, stored[::step], tensor_type):
            return None
        errors = RowErrors.of(found, stored[::step])
        if step > 1 and is_beyond_its_type(errors, stored[::step], tensor_type):
            errors, step = RowErrors.of(self.quantizer.dequantize(raw, tensor_type), stored), 1
        return self._compare_range(rows, stored[::step], tensor_type, errors)

    def _compare_range(
        self,
        rows: RowRange,
        stored: Floats,
        tensor_type: GGMLQuantizationType,
        errors: RowErrors,
    ) -> str | None:
        """The violation if a range as a whole errs more than its type does."""
        if not is_beyond_its_type(errors, stored, tensor_type):
            return None
        limit = (
            f"expected at most {range_bound(tensor_type):.1%} for {tensor_type.name}; the type "
            "loses these values, choose another one for this tensor"
        )
        found = f"differs from {rows.slab.stored} by {errors.relative():.1%}"
        return f"{self._where(rows)} {found}, {limit}"

    def _compare_rows(
        self,
        rows: RowRange,
        raw: Bytes,
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
        self, original: Original, raw: Bytes, tensor_type: GGMLQuantizationType
    ) -> str | None:
        """The violation if a range does not have the bytes that the export makes."""
        rows = original.rows
        wanted = original.blocks(self.blocks, tensor_type)
        if are_equal(raw, wanted):
            return None
        stored = original.stored
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

    def _not_the_source(
        self, original: Original, raw: Bytes, tensor_type: GGMLQuantizationType
    ) -> str:
        """The violation of a range whose blocks are not those of the GGUF source."""
        row = int((raw != original.blocks(self.blocks, tensor_type)).any(axis=1).argmax())
        limit = f"expected the source's blocks of {tensor_type.name}, byte for byte"
        return self._violation(original.rows, raw, original.stored, row, tensor_type, limit)

    def _is_sound(
        self,
        rows: RowRange,
        raw: Bytes,
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
        raw: Bytes,
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
