"""What the bytes of every tensor are: a range of whole rows of one matrix at a time.

The export writes these bytes and exact verification compares with them, so there is one function
for both. Ranges are independent: a thread that is free takes the next one, in the order of the
file, and quantizers run without the interpreter's lock, so that every thread works from the first
range to the last. The kernel prefetches the bytes of the ranges to come, so that no thread waits
for the disk.

Memory: a range is at most 16 MiB as float32, at most as much as it was stored, and its quantized
form at most 16 MiB for each type. A matrix that is transformed is one range, whatever its size.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from reap2gguf.errors import ArtifactError, CheckpointError
from reap2gguf.ggml import NEEDS_IMPORTANCE, UNWEIGHTED_TYPES
from reap2gguf.gguf_files.growing import entry_shape
from reap2gguf.gguf_files.rows import expect_rows, read_rows, row_ranges, rows_per_matrix

if TYPE_CHECKING:
    import numpy.typing as npt
    from gguf import GGMLQuantizationType

    from reap2gguf.checkpoint.weights import Floats, Weights
    from reap2gguf.gguf_files.imatrix import Imatrix, ImatrixEntry
    from reap2gguf.models.description import GgufTensor, Slab
    from reap2gguf.quantizing.quantizer import Quantizer


@dataclass(frozen=True)
class RowRange:
    """Rows [first, last) of one matrix of a tensor."""

    tensor: GgufTensor
    matrix: int
    slab: Slab
    first: int
    last: int

    @property
    def first_in_tensor(self) -> int:
        """The first row, counted from the tensor's first matrix."""
        return self.matrix * rows_per_matrix(self.tensor) + self.first

    @property
    def n_values(self) -> int:
        """Weights of the range."""
        return (self.last - self.first) * self.tensor.n_columns


@dataclass(frozen=True)
class BlockMaker:
    """Reads ranges of rows, and quantizes them with the importance of their columns."""

    weights: Weights
    quantizer: Quantizer
    importance: Mapping[str, ImatrixEntry]

    def read(self, rows: RowRange) -> Floats:
        """The values (last - first, columns) that GGUF is to hold; CheckpointError for a NaN."""
        values = read_rows(self.weights, rows.tensor, rows.slab, rows.first, rows.last)
        if not np.isfinite(values).all():
            raise CheckpointError(f"{self._where(rows)} holds NaN or infinite values")
        return values

    def quantize(
        self, rows: RowRange, values: Floats, tensor_type: GGMLQuantizationType
    ) -> npt.NDArray[np.uint8]:
        """Whole rows of a range as bytes (rows, bytes of a row).

        Raises CheckpointError for a value beyond the type's range.
        """
        with self._named(rows):
            return self.quantizer.quantize(values, tensor_type, self._importance(rows, tensor_type))

    def check_precision(
        self,
        rows: RowRange,
        values: Floats,
        tensor_type: GGMLQuantizationType,
        data: npt.NDArray[np.uint8],
    ) -> None:
        """Raise CheckpointError if values are so small that the type loses them."""
        with self._named(rows):
            importance = self._importance(rows, tensor_type)
            self.quantizer.check_precision(values, data, tensor_type, importance)

    def _importance(self, rows: RowRange, tensor_type: GGMLQuantizationType) -> Floats | None:
        if tensor_type.name in UNWEIGHTED_TYPES:  # an entry that is still computed may be absent
            return None
        entry = self.importance.get(rows.tensor.name)
        return entry.importance_of(rows.matrix, rows.tensor.n_columns) if entry else None

    @contextmanager
    def _named(self, rows: RowRange) -> Iterator[None]:
        """Name the stored tensor in an error of the quantizer."""
        try:
            yield
        except ValueError as error:
            raise CheckpointError(f"{self._where(rows)} as {rows.tensor.name}: {error}") from error

    def _where(self, rows: RowRange) -> str:
        """Folder and name of the stored tensor that rows are read from."""
        name, _ = self.weights.origin(rows.slab.stored)
        return f"{self.weights.folder}: {name!r}"


def all_ranges(tensors: Sequence[GgufTensor]) -> Iterator[RowRange]:
    """The ranges that all tensors are made of, in their order."""
    for tensor in tensors:
        for matrix, slab in enumerate(tensor.slabs):
            for first, last in row_ranges(tensor):
                yield RowRange(tensor, matrix, slab, first, last)


def work_through(
    work: Callable[[RowRange], None],
    weights: Weights,
    ranges: Iterator[RowRange],
    n_threads: int,
) -> None:
    """Work on every range: a thread takes the next as soon as it is free, so none waits."""
    lock, failed = threading.Lock(), threading.Event()
    ranges = _prefetched(weights, ranges, 2 * n_threads)

    def take() -> RowRange | None:
        with lock:
            return None if failed.is_set() else next(ranges, None)

    def work_on() -> None:
        while (rows := take()) is not None:
            work(rows)

    with ThreadPoolExecutor(n_threads) as pool:
        try:
            for worker in as_completed([pool.submit(work_on) for _ in range(n_threads)]):
                worker.result()
        except BaseException:
            failed.set()  # the other threads finish the range they work on
            with weights.without_fetching():  # or give up where they wait for a download
                pool.shutdown()
            raise


def _prefetched(weights: Weights, ranges: Iterator[RowRange], count: int) -> Iterator[RowRange]:
    """The same ranges, each being read from the disk while the `count` before it are taken."""
    coming: deque[RowRange] = deque()
    for rows in ranges:
        expect_rows(weights, rows.tensor, rows.slab, rows.first, rows.last)
        coming.append(rows)
        if len(coming) > count:
            yield coming.popleft()
    yield from coming


def check_imatrix(
    tensors: Sequence[GgufTensor],
    types_of: Mapping[str, Collection[GGMLQuantizationType]],
    imatrix: Imatrix | None,
) -> None:
    """Raises ArtifactError for an imatrix of another model, or without what a type needs.

    `types_of` are the types that each tensor is quantized to.
    """
    entries = imatrix.entries if imatrix else {}
    if foreign := sorted(entries.keys() - {tensor.name for tensor in tensors}):
        raise ArtifactError(
            f"imatrix: has an entry for {foreign[0]}, which the model does not have; it is of "
            "another model"
        )
    for tensor in tensors:
        if tensor.name in entries:
            rows, columns = entry_shape(entries, tensor.name)
            size = tensor.n_matrices * tensor.n_columns
            if rows * columns != size or columns % tensor.n_columns:
                raise ArtifactError(
                    f"imatrix: {tensor.name} has {rows * columns} values, expected "
                    f"{tensor.n_matrices} x {tensor.n_columns}; it is of another model, such as "
                    "the one before pruning"
                )
        elif needy := NEEDS_IMPORTANCE.intersection(types_of[tensor.name]):
            raise ArtifactError(
                f"imatrix: no entry for {tensor.name}, but {min(needy).name} needs one; compute "
                "one with `reap2gguf imatrix`"
            )
