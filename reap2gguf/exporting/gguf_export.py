"""Weights to GGUF files: every tensor is read once, for however many files.

The work is cut into ranges of whole rows of one matrix. A range is read, widened to float32 and
transformed, quantized once for each distinct type that the files want, and written to its position
in each file. Ranges are independent: a thread that is free takes the next one, in the order of the
files, and libggml runs without the interpreter's lock, so that every thread works from the first
range to the last. The kernel prefetches the bytes of the ranges to come, so that no thread waits
for the disk. No intermediate file is written. With a journal, tensors that are on the disk already
are not written again.

Memory: a thread holds one range: at most 16 MiB as float32, at most as much as it was stored, and
its quantized forms, 2 to 16 MiB for each distinct type. A matrix that is transformed is one range,
whatever its size. Besides the ranges there is the imatrix: 4 bytes per column.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType

from reap2gguf.atomic import OutputFile, open_file, part_of, rename
from reap2gguf.checkpoint.weights import Weights
from reap2gguf.errors import ArtifactError, CheckpointError, OutputError
from reap2gguf.exporting.header import GgufLayout, HeaderFacts, lay_out
from reap2gguf.files import is_own_file
from reap2gguf.ggml import NEEDS_IMPORTANCE, Ggml, load_ggml
from reap2gguf.gguf_files.reader import row_bytes
from reap2gguf.gguf_files.rows import expect_rows, read_rows, row_ranges, rows_per_matrix

if TYPE_CHECKING:
    from reap2gguf.checkpoint.weights import Floats, Weights
    from reap2gguf.exporting.journal import ExportJournal
    from reap2gguf.gguf_files.imatrix import Imatrix, ImatrixEntry
    from reap2gguf.models.description import GgufTensor, Slab
    from reap2gguf.progress import Progress, Task


@dataclass(frozen=True)
class GgufOutput:
    """One file to write: its final name and its header."""

    path: Path
    header: HeaderFacts


@dataclass(frozen=True)
class _OpenFile:
    file: OutputFile
    layout: GgufLayout
    tensor_types: Mapping[str, GGMLQuantizationType]


@dataclass(frozen=True)
class _RowRange:
    """Rows [first, last) of one matrix of a tensor."""

    tensor: GgufTensor
    matrix: int
    slab: Slab
    first: int
    last: int
    first_row_in_tensor: int


def export_gguf(
    weights: Weights,
    tensors: Sequence[GgufTensor],
    outputs: Sequence[GgufOutput],
    imatrix: Imatrix | None,
    n_threads: int,
    progress: Progress,
    journal: ExportJournal | None = None,
) -> None:
    """Write all `outputs` in one pass over the weights; they get their final names together.

    An export that fails leaves unfinished files if there is a journal to resume from, and none
    otherwise. Raises ArtifactError if the imatrix does not fit, CheckpointError if a stored value
    is not finite, OutputError if the disk is full or fails.
    """
    _check_imatrix(tensors, outputs, imatrix)
    ggml = load_ggml()
    layouts = [lay_out(weights.folder, tensors, output.header) for output in outputs]
    resume = _can_resume(journal, tensors, outputs, layouts)
    try:
        with ExitStack() as stack:
            files = [
                stack.enter_context(_opened(output, layout, resume))
                for output, layout in zip(outputs, layouts, strict=True)
            ]
            total = sum(prod(tensor.shape) for tensor in tensors) * len(outputs)
            task = stack.enter_context(progress.task("Writing GGUF", total, "weights"))
            job = _Job(weights, ggml, files, imatrix.entries if imatrix else {}, task, journal)
            job.run_all(tensors, n_threads)
    except BaseException:
        if journal is None:
            for output in outputs:
                with suppress(OSError):  # the error that is being raised says more
                    part_of(output.path).unlink(missing_ok=True)
        raise
    for output in outputs:
        rename(part_of(output.path), output.path)


def _can_resume(
    journal: ExportJournal | None,
    tensors: Sequence[GgufTensor],
    outputs: Sequence[GgufOutput],
    layouts: Sequence[GgufLayout],
) -> bool:
    """Whether all files that the journal is about exist; if not, the journal is cleared."""
    if journal is None or journal.is_empty:
        return False
    is_whole = all(tensor.name in journal for tensor in tensors)
    for output, layout in zip(outputs, layouts, strict=True):
        part = part_of(output.path)
        if not is_own_file(part) and is_whole and _has_size(output.path, layout.n_bytes):
            rename(output.path, part)  # interrupted between two renames
        if not _has_size(part, layout.n_bytes):
            journal.clear()
            return False
    return True


def _has_size(path: Path, n_bytes: int) -> bool:
    return is_own_file(path) and path.stat().st_size == n_bytes


@contextmanager
def _opened(output: GgufOutput, layout: GgufLayout, resume: bool) -> Iterator[_OpenFile]:
    """A file of its full length, so that a full disk is found now, with its header written."""
    with open_file(part_of(output.path), output.path, resume) as file:
        file.reserve(layout.n_bytes)
        file.write_at(layout.header, 0)
        yield _OpenFile(file, layout, output.header.tensor_types)


@dataclass(frozen=True)
class _Job:
    weights: Weights
    ggml: Ggml
    files: Sequence[_OpenFile]
    importance: Mapping[str, ImatrixEntry]
    task: Task
    journal: ExportJournal | None

    def run_all(self, tensors: Sequence[GgufTensor], n_threads: int) -> None:
        """Write every tensor that the journal does not have, and flush the files."""
        journal = self.journal
        missing = [tensor for tensor in tensors if journal is None or tensor.name not in journal]
        n_values = sum(prod(tensor.shape) for tensor in tensors)
        self.task.advance((n_values - sum(prod(t.shape) for t in missing)) * len(self.files))
        outputs = [file.file for file in self.files]
        remaining = Counter(rows.tensor.name for rows in _row_ranges(missing))
        lock = threading.Lock()

        def work(rows: _RowRange) -> None:
            self.run(rows)
            with lock:
                remaining[rows.tensor.name] -= 1
                is_whole = not remaining[rows.tensor.name]
            if is_whole and journal is not None:
                journal.add(rows.tensor.name, outputs)

        try:
            _run_all(work, self.weights, _row_ranges(missing), n_threads)
        except BaseException:
            if journal is not None:
                with suppress(OutputError):  # the error that is being raised says more
                    journal.save(outputs)
            raise
        for output in outputs:
            output.sync()
        if journal is not None:
            journal.save(outputs)

    def run(self, rows: _RowRange) -> None:
        """Read one range of rows and write it, quantized, to every file."""
        tensor = rows.tensor
        values = read_rows(self.weights, tensor, rows.slab, rows.first, rows.last)
        if not np.isfinite(values).all():
            raise CheckpointError(f"{self._where(rows)} holds NaN or infinite values")
        entry = self.importance.get(tensor.name)
        importance = entry.importance_of(rows.matrix, tensor.n_columns) if entry else None
        done: dict[GGMLQuantizationType, npt.NDArray[np.uint8]] = {}
        for file in self.files:
            tensor_type = file.tensor_types[tensor.name]
            if tensor_type not in done:
                done[tensor_type] = self._quantize(rows, values, tensor_type, importance)
            position = rows.first_row_in_tensor * row_bytes(tensor_type, tensor.n_columns)
            data = done[tensor_type].reshape(-1).data
            file.file.write_at(data, file.layout.offsets[tensor.name] + position)
            self.task.advance(values.size)

    def _quantize(
        self,
        rows: _RowRange,
        values: Floats,
        tensor_type: GGMLQuantizationType,
        importance: Floats | None,
    ) -> npt.NDArray[np.uint8]:
        try:
            return self.ggml.quantize(values, tensor_type, importance)
        except ValueError as error:
            raise CheckpointError(f"{self._where(rows)} as {rows.tensor.name}: {error}") from error

    def _where(self, rows: _RowRange) -> str:
        """Folder and name of the stored tensor that rows are read from."""
        name, _ = self.weights.origin(rows.slab.stored)
        return f"{self.weights.folder}: {name!r}"


def _row_ranges(tensors: Sequence[GgufTensor]) -> Iterator[_RowRange]:
    for tensor in tensors:
        n_rows = rows_per_matrix(tensor)
        for matrix, slab in enumerate(tensor.slabs):
            for first, last in row_ranges(tensor):
                yield _RowRange(tensor, matrix, slab, first, last, matrix * n_rows + first)


def _prefetched(weights: Weights, ranges: Iterator[_RowRange], count: int) -> Iterator[_RowRange]:
    """The same ranges, each being read from the disk while the `count` before it are taken."""
    coming: deque[_RowRange] = deque()
    for rows in ranges:
        expect_rows(weights, rows.tensor, rows.slab, rows.first, rows.last)
        coming.append(rows)
        if len(coming) > count:
            yield coming.popleft()
    yield from coming


def _run_all(
    work: Callable[[_RowRange], None],
    weights: Weights,
    ranges: Iterator[_RowRange],
    n_threads: int,
) -> None:
    """Work on every range: a thread takes the next as soon as it is free, so none waits."""
    lock, failed = threading.Lock(), threading.Event()
    ranges = _prefetched(weights, ranges, 2 * n_threads)

    def take() -> _RowRange | None:
        with lock:
            return None if failed.is_set() else next(ranges, None)

    def work_through() -> None:
        while (rows := take()) is not None:
            work(rows)

    with ThreadPoolExecutor(n_threads) as pool:
        try:
            for worker in as_completed([pool.submit(work_through) for _ in range(n_threads)]):
                worker.result()
        except BaseException:
            failed.set()  # the other threads finish the range they work on
            with weights.without_fetching():  # or give up where they wait for a download
                pool.shutdown()
            raise


def _check_imatrix(
    tensors: Sequence[GgufTensor], outputs: Sequence[GgufOutput], imatrix: Imatrix | None
) -> None:
    """Raises ArtifactError for an imatrix of another model, or without what a type needs."""
    entries = imatrix.entries if imatrix else {}
    if foreign := sorted(entries.keys() - {tensor.name for tensor in tensors}):
        raise ArtifactError(
            f"imatrix: has an entry for {foreign[0]}, which the model does not have; it is of "
            "another model"
        )
    for tensor in tensors:
        tensor_types = {output.header.tensor_types[tensor.name] for output in outputs}
        if entry := entries.get(tensor.name):
            size = tensor.n_matrices * tensor.n_columns
            if entry.sums.size != size or entry.sums.shape[1] % tensor.n_columns:
                raise ArtifactError(
                    f"imatrix: {tensor.name} has {entry.sums.size} values, expected "
                    f"{tensor.n_matrices} x {tensor.n_columns}; it is of another model, such as "
                    "the one before pruning"
                )
        elif needy := tensor_types & NEEDS_IMPORTANCE:
            raise ArtifactError(
                f"imatrix: no entry for {tensor.name}, but {min(needy).name} needs one; compute "
                "one with `reap2gguf imatrix`"
            )
