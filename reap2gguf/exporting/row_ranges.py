"""What the bytes of every tensor are: a range of whole rows of one matrix at a time.

The export writes these bytes and exact verification compares with them, so there is one function
for both. Ranges are independent: a thread that is free takes the next one, in the order of the
file, and quantizers run without the interpreter's lock, so that every thread works from the first
range to the last. The kernel prefetches the bytes of the ranges to come, so that no thread waits
for the disk.

A batch of them is written at once: one range on a CPU, several neighbours on a GPU.

Memory: a range is at most 16 MiB as float32, at most as much as it was stored, and its quantized
form at most 16 MiB for each type. A matrix that is transformed is one range, whatever its size.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from reap2gguf.checkpoint.safetensors_header import ITEM_BYTES
from reap2gguf.checkpoint.weights import FLOATS
from reap2gguf.errors import ArtifactError, CheckpointError
from reap2gguf.ggml import NEEDS_IMPORTANCE, UNWEIGHTED_TYPES, is_tiny
from reap2gguf.gguf_files.growing import entry_shape
from reap2gguf.gguf_files.rows import (
    expect_rows,
    read_rows,
    row_ranges,
    rows_per_matrix,
    stored_bytes,
)
from reap2gguf.gguf_files.stored_blocks import read_blocks
from reap2gguf.quantizing.stored_rows import StoredRows

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

    def blocks(self, weights: Weights) -> npt.NDArray[np.uint8]:
        """Its rows (last - first, bytes of a row) in the blocks that the weights have them in."""
        if self.tensor.source_type is None:
            return read_blocks(weights, self.tensor, self.slab, self.first, self.last)
        first = self.first_in_tensor
        assert weights.blocks is not None
        return weights.blocks.read(self.tensor.name, first, first + self.last - self.first)

    @property
    def n_values(self) -> int:
        """Weights of the range."""
        return (self.last - self.first) * self.tensor.n_columns


Batch = tuple[RowRange, ...]  # neighbours in one tensor


@dataclass(frozen=True)
class BlockMaker:
    """Reads ranges of rows, and quantizes them with the importance of their columns."""

    weights: Weights
    quantizer: Quantizer
    importance: Mapping[str, ImatrixEntry]
    # of each thread: a new one for each range would cost the system a page at a time
    _kept: threading.local = field(
        default_factory=threading.local, init=False, repr=False, compare=False
    )

    def read(self, rows: RowRange) -> Floats:
        """The values (last - first, columns) that GGUF is to hold; CheckpointError for a NaN."""
        values = read_rows(self.weights, rows.tensor, rows.slab, rows.first, rows.last)
        if not np.isfinite(values).all():
            raise self.not_finite(rows)
        return values

    def _read_stored(self, rows: RowRange) -> StoredRows:
        """The same values as they are stored, if they are; valid until this thread calls again."""
        place = stored_bytes(self.weights, rows.tensor, rows.slab, rows.first, rows.last)
        if place is None:
            values = read_rows(self.weights, rows.tensor, rows.slab, rows.first, rows.last)
            return StoredRows(np.ascontiguousarray(values), "F32")
        buffer: npt.NDArray[np.uint8] | None = getattr(self._kept, "buffer", None)
        if buffer is None or buffer.size < place.count:
            buffer = self._kept.buffer = np.empty(place.count, np.uint8)
        self.weights.read_bytes(place.name, place.first, buffer[: place.count])
        return StoredRows.of(buffer[: place.count], place.dtype, rows.tensor.n_columns)

    def not_finite(self, rows: RowRange) -> CheckpointError:
        """The error of a range that holds NaN."""
        return CheckpointError(f"{self._where(rows)} holds NaN or infinite values")

    def _is_finite(self, data: npt.NDArray[np.uint8], tensor_type: GGMLQuantizationType) -> bool:
        if tensor_type.name in FLOATS:
            return _are_finite(data, tensor_type.name)
        return self.quantizer.ggml.is_finite(data, tensor_type)

    def quantize(
        self, rows: RowRange, values: Floats | StoredRows, tensor_type: GGMLQuantizationType
    ) -> npt.NDArray[np.uint8]:
        """Whole rows of a range as bytes (rows, bytes of a row).

        Blocks that the checkpoint has in this type are copied: quantizing their values again would
        make other blocks of the same values. Raises CheckpointError for a value beyond the type's
        range.
        """
        if rows.tensor.is_copied_as(tensor_type):
            return rows.blocks(self.weights)
        with self.named(rows):
            importance = self.importance_of(rows, (tensor_type,))
            return self.quantizer.quantize(values, tensor_type, importance)

    def check_precision(
        self,
        rows: RowRange,
        values: Floats,
        tensor_type: GGMLQuantizationType,
        data: npt.NDArray[np.uint8],
    ) -> None:
        """Raise CheckpointError if values are so small that the type loses them."""
        with self.named(rows):
            importance = self.importance_of(rows, (tensor_type,))
            self.quantizer.check_precision(values, data, tensor_type, importance)

    def make(
        self, batch: Batch, types: Iterable[GGMLQuantizationType]
    ) -> dict[GGMLQuantizationType, npt.NDArray[np.uint8]]:
        """All rows of a batch as bytes (rows, bytes of a row) of each type.

        Raises CheckpointError as the methods above do.
        """
        made: dict[GGMLQuantizationType, list[npt.NDArray[np.uint8]]] = {one: [] for one in types}
        for rows in batch:
            for tensor_type, data in self._made_of(rows, made):
                made[tensor_type].append(data)
        return {
            one: parts[0] if len(parts) == 1 else np.concatenate(parts)
            for one, parts in made.items()
        }

    def _made_of(
        self, rows: RowRange, types: Iterable[GGMLQuantizationType]
    ) -> Iterator[tuple[GGMLQuantizationType, npt.NDArray[np.uint8]]]:
        """A range as bytes of each type; values are read only where blocks are made of them."""
        copied = [one for one in types if rows.tensor.is_copied_as(one)]
        for tensor_type in copied:
            data = rows.blocks(self.weights)
            if not self._is_finite(data, tensor_type):
                raise self.not_finite(rows)
            yield tensor_type, data
        if not (others := [one for one in types if one not in copied]):
            return
        values = self._read_stored(rows)
        largest = values.largest
        if largest == float("inf"):
            raise self.not_finite(rows)
        for tensor_type in others:
            data = self.quantize(rows, values, tensor_type)
            if is_tiny(largest, tensor_type):
                self.check_precision(rows, values.values, tensor_type, data)
            yield tensor_type, data

    def importance_of(self, rows: RowRange, types: Iterable[GGMLQuantizationType]) -> Floats | None:
        """The importance (columns,) of a matrix for these types.

        None if there is none, or if no type needs it: then nobody waits for it.
        """
        if all(one.name in UNWEIGHTED_TYPES for one in types):
            return None
        entry = self.importance.get(rows.tensor.name)
        return entry.importance_of(rows.matrix, rows.tensor.n_columns) if entry else None

    @contextmanager
    def named(self, rows: RowRange) -> Iterator[None]:
        """Name the stored tensor in an error of the quantizer."""
        try:
            yield
        except ValueError as error:
            raise CheckpointError(f"{self._where(rows)} as {rows.tensor.name}: {error}") from error

    def _where(self, rows: RowRange) -> str:
        """Where the stored tensor is that rows are read from, and its name."""
        name = self.weights.shown_name(rows.slab.stored, rows.slab.index or 0)
        return f"{self.weights.shown}: {name}"


def _are_finite(data: npt.NDArray[np.uint8], dtype: str) -> bool:
    """Whether rows of F32, F16 or BF16 hold no NaN and no infinity."""
    return StoredRows.of(data.reshape(-1), dtype, data.size // ITEM_BYTES[dtype]).largest < np.inf


def made_types(
    tensors: Iterable[GgufTensor], files: Sequence[Mapping[str, GGMLQuantizationType]]
) -> dict[str, set[GGMLQuantizationType]]:
    """The types that each tensor is quantized to, for files with these types; not those that it is
    copied as."""
    return {
        tensor.name: {of[tensor.name] for of in files if not tensor.is_copied_as(of[tensor.name])}
        for tensor in tensors
    }


def all_ranges(tensors: Sequence[GgufTensor]) -> Iterator[RowRange]:
    """The ranges that all tensors are made of, in their order."""
    for tensor in tensors:
        for matrix, slab in enumerate(tensor.slabs):
            for first, last in row_ranges(tensor):
                yield RowRange(tensor, matrix, slab, first, last)


def batches(
    weights: Weights, tensors: Sequence[GgufTensor], most_bytes: int = 0
) -> Iterator[Batch]:
    """All ranges, as many together as `batched` puts into a batch."""
    return batched(weights, all_ranges(tensors), most_bytes)


def batched(weights: Weights, ranges: Iterable[RowRange], most_bytes: int) -> Iterator[Batch]:
    """Ranges, as many together as lie in one tensor and have so many bytes as they are stored.

    A range that has more, or that is not stored as it is, is a batch of its own.
    """
    batch: list[RowRange] = []
    dtype, n_bytes = "", 0
    for rows in ranges:
        stored = stored_bytes(weights, rows.tensor, rows.slab, rows.first, rows.last)
        count = most_bytes + 1 if stored is None else stored.count
        name = "" if stored is None else stored.dtype
        if batch and (
            rows.tensor is not batch[0].tensor or name != dtype or n_bytes + count > most_bytes
        ):
            yield tuple(batch)
            batch, n_bytes = [], 0
        batch.append(rows)
        dtype, n_bytes = name, n_bytes + count
    if batch:
        yield tuple(batch)


def work_through(
    work: Callable[[Batch], None],
    weights: Weights,
    batches: Iterator[Batch],
    n_threads: int,
    stop: Callable[[], None] = lambda: None,
) -> None:
    """Work on every batch: a thread takes the next as soon as it is free, so none waits.

    When one fails, `stop` is called, for threads that wait for what this process still computes.
    """
    lock, failed = threading.Lock(), threading.Event()
    coming = _prefetched(weights, batches, 2 * n_threads)

    def take() -> Batch | None:
        with lock:
            return None if failed.is_set() else next(coming, None)

    def work_on() -> None:
        while (batch := take()) is not None:
            work(batch)

    with ThreadPoolExecutor(n_threads) as pool:
        try:
            for worker in as_completed([pool.submit(work_on) for _ in range(n_threads)]):
                worker.result()
        except BaseException:
            failed.set()  # the other threads finish the range they work on
            stop()
            with weights.without_fetching():  # or give up where they wait for a download
                pool.shutdown()
            raise


def _prefetched(weights: Weights, batches: Iterator[Batch], count: int) -> Iterator[Batch]:
    """The same batches, each being read from the disk while the `count` before it are taken."""
    coming: deque[Batch] = deque()
    for batch in batches:
        for rows in batch:
            expect_rows(weights, rows.tensor, rows.slab, rows.first, rows.last)
        coming.append(batch)
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
