"""Checkpoint to GGUF files: every tensor is read once, for however many files.

The work is cut into pieces of whole rows of one matrix. A piece is read, widened to float32 and
transformed, quantized once for each distinct type that the files want, and written at its place in
each file. Pieces are independent: a thread that is free takes the next one, in the order of the
files, and libggml runs without the interpreter's lock, so that every thread works from the first
piece to the last. The kernel is asked for the bytes of the pieces to come, so that no thread waits
for the disk. No intermediate file is written. With a journal, tensors that are on the disk already
are not written again.

Memory: a thread holds one piece: at most 16 MiB as float32, at most as much as it was stored, and
its quantized forms, 2 to 16 MiB for each distinct type. A matrix that is transformed is one piece,
whatever its size. Beside the pieces there is the imatrix: 4 bytes a column.
"""

from __future__ import annotations

import os
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType

from reap2gguf.atomic import OutputFile, open_file, part_of, rename
from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.errors import ArtifactError, CheckpointError, OutputError
from reap2gguf.exporting.header import GgufLayout, HeaderFacts, lay_out
from reap2gguf.exporting.journal import ExportJournal
from reap2gguf.ggml import NEEDS_IMPORTANCE, Ggml, load_ggml
from reap2gguf.gguf_files.imatrix import Imatrix, ImatrixEntry
from reap2gguf.gguf_files.reader import row_bytes
from reap2gguf.gguf_files.rows import expect_rows, read_rows, row_pieces, rows_per_matrix
from reap2gguf.models.description import GgufTensor, Slab
from reap2gguf.progress import Progress, Task

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class GgufOutput:
    """One file to write, and the name it takes when it is whole."""

    path: Path
    header: HeaderFacts


@dataclass(frozen=True)
class _OpenFile:
    file: OutputFile
    layout: GgufLayout
    tensor_types: Mapping[str, GGMLQuantizationType]


@dataclass(frozen=True)
class _Piece:
    """Rows [first, last) of one matrix of a tensor."""

    tensor: GgufTensor
    matrix: int
    slab: Slab
    first: int
    last: int
    first_row_in_tensor: int


def export_gguf(
    checkpoint: Checkpoint,
    tensors: Sequence[GgufTensor],
    outputs: Sequence[GgufOutput],
    imatrix: Imatrix | None,
    n_threads: int,
    progress: Progress,
    journal: ExportJournal | None = None,
) -> None:
    """Write all `outputs` in one pass over the checkpoint; they take their names together.

    An export that fails leaves unfinished files where there is a journal to go on from, and none
    otherwise. Raises ArtifactError if the imatrix does not fit, CheckpointError if a stored value
    is not finite, OutputError if the disk is full or fails.
    """
    _check_imatrix(tensors, outputs, imatrix)
    ggml = load_ggml()
    layouts = [lay_out(checkpoint.folder, tensors, output.header) for output in outputs]
    anew = not _can_resume(journal, tensors, outputs, layouts)
    try:
        with ExitStack() as stack:
            files = [
                stack.enter_context(_opened(output, layout, anew))
                for output, layout in zip(outputs, layouts, strict=True)
            ]
            total = sum(prod(tensor.shape) for tensor in tensors) * len(outputs)
            task = stack.enter_context(progress.task("Writing GGUF", total, "weights"))
            job = _Job(checkpoint, ggml, files, imatrix.entries if imatrix else {}, task, journal)
            job.run_all(tensors, n_threads)
    except BaseException:
        if journal is None:
            for output in outputs:
                with suppress(OSError):  # the error under way says more
                    part_of(output.path).unlink(missing_ok=True)
        raise
    for output in outputs:
        rename(part_of(output.path), output.path)


def _can_resume(
    journal: ExportJournal | None, tensors: Sequence[GgufTensor], outputs: Sequence[GgufOutput],
    layouts: Sequence[GgufLayout],
) -> bool:  # fmt: skip
    """Whether the files that a journal speaks of are all there; else it forgets them."""
    if journal is None or journal.is_empty:
        return False
    is_whole = all(tensor.name in journal for tensor in tensors)
    for output, layout in zip(outputs, layouts, strict=True):
        part = part_of(output.path)
        if not part.is_file() and is_whole and _has_size(output.path, layout.n_bytes):
            rename(output.path, part)  # interrupted while names were given
        if not _has_size(part, layout.n_bytes):
            journal.forget()
            return False
    return True


def _has_size(path: Path, n_bytes: int) -> bool:
    return path.is_file() and path.stat().st_size == n_bytes


@contextmanager
def _opened(output: GgufOutput, layout: GgufLayout, anew: bool) -> Iterator[_OpenFile]:
    """A file of its whole length, so that a full disk shows now, with its header written."""
    flags = os.O_TRUNC if anew else 0
    with open_file(part_of(output.path), output.path, flags) as file:
        file.reserve(layout.n_bytes)
        file.write_at(layout.header, 0)
        yield _OpenFile(file, layout, output.header.tensor_types)


@dataclass(frozen=True)
class _Job:
    checkpoint: Checkpoint
    ggml: Ggml
    files: Sequence[_OpenFile]
    importance: Mapping[str, ImatrixEntry]
    task: Task
    journal: ExportJournal | None

    def run_all(self, tensors: Sequence[GgufTensor], n_threads: int) -> None:
        """Write every tensor that the journal has not, and flush the files."""
        journal = self.journal
        missing = [tensor for tensor in tensors if journal is None or tensor.name not in journal]
        weights = sum(prod(tensor.shape) for tensor in tensors)
        self.task.advance((weights - sum(prod(t.shape) for t in missing)) * len(self.files))
        outputs = [file.file for file in self.files]
        left = Counter(piece.tensor.name for piece in _pieces(missing))
        turn = threading.Lock()

        def work(piece: _Piece) -> None:
            self.run(piece)
            with turn:
                left[piece.tensor.name] -= 1
                is_whole = not left[piece.tensor.name]
            if is_whole and journal is not None:
                journal.add(piece.tensor.name, outputs)

        try:
            _run_all(work, self.checkpoint, _pieces(missing), n_threads)
        except BaseException:
            if journal is not None:
                with suppress(OutputError):  # the error under way says more
                    journal.save(outputs)
            raise
        for output in outputs:
            output.sync()
        if journal is not None:
            journal.save(outputs)

    def run(self, piece: _Piece) -> None:
        """Read one piece and write it, quantized, to every file."""
        tensor = piece.tensor
        rows = read_rows(self.checkpoint, tensor, piece.slab, piece.first, piece.last)
        if not np.isfinite(rows).all():
            raise CheckpointError(
                f"{self.checkpoint.folder}: {piece.slab.stored!r} holds NaN or infinite values"
            )
        entry = self.importance.get(tensor.name)
        weights = entry.importance_of(piece.matrix, tensor.n_columns) if entry else None
        done: dict[GGMLQuantizationType, npt.NDArray[np.uint8]] = {}
        for file in self.files:
            tensor_type = file.tensor_types[tensor.name]
            if tensor_type not in done:
                done[tensor_type] = self._quantize(piece, rows, tensor_type, weights)
            place = piece.first_row_in_tensor * row_bytes(tensor_type, tensor.n_columns)
            data = done[tensor_type].reshape(-1).data
            file.file.write_at(data, file.layout.offsets[tensor.name] + place)
            self.task.advance(rows.size)

    def _quantize(
        self, piece: _Piece, rows: Floats, tensor_type: GGMLQuantizationType, weights: Floats | None
    ) -> npt.NDArray[np.uint8]:
        try:
            return self.ggml.quantize(rows, tensor_type, weights)
        except ValueError as error:
            stored = f"{self.checkpoint.folder}: {piece.slab.stored!r}"
            raise CheckpointError(f"{stored} as {piece.tensor.name}: {error}") from error


def _pieces(tensors: Sequence[GgufTensor]) -> Iterator[_Piece]:
    for tensor in tensors:
        n_rows = rows_per_matrix(tensor)
        for matrix, slab in enumerate(tensor.slabs):
            for first, last in row_pieces(tensor):
                yield _Piece(tensor, matrix, slab, first, last, matrix * n_rows + first)


def _fetched_ahead(
    checkpoint: Checkpoint, pieces: Iterator[_Piece], count: int
) -> Iterator[_Piece]:
    """The same pieces, each on its way from the disk while the `count` before it are taken."""
    coming: deque[_Piece] = deque()
    for piece in pieces:
        expect_rows(checkpoint, piece.tensor, piece.slab, piece.first, piece.last)
        coming.append(piece)
        if len(coming) > count:
            yield coming.popleft()
    yield from coming


def _run_all(
    work: Callable[[_Piece], None],
    checkpoint: Checkpoint,
    pieces: Iterator[_Piece],
    n_threads: int,
) -> None:
    """Work on every piece: a thread takes the next as soon as it is free, so none waits."""
    turn, failed = threading.Lock(), threading.Event()
    pieces = _fetched_ahead(checkpoint, pieces, 2 * n_threads)

    def take() -> _Piece | None:
        with turn:
            return None if failed.is_set() else next(pieces, None)

    def work_on() -> None:
        while (piece := take()) is not None:
            work(piece)

    with ThreadPoolExecutor(n_threads) as pool:
        try:
            for worker in as_completed([pool.submit(work_on) for _ in range(n_threads)]):
                worker.result()
        except BaseException:
            failed.set()  # the other threads end with the piece that they are at
            with checkpoint.without_fetching():  # or with none, where they wait for its file
                pool.shutdown()
            raise


def _check_imatrix(
    tensors: Sequence[GgufTensor], outputs: Sequence[GgufOutput], imatrix: Imatrix | None
) -> None:
    """Refuse an imatrix of another model, and one without what a type needs, before the work."""
    entries = imatrix.entries if imatrix else {}
    if foreign := sorted(entries.keys() - {tensor.name for tensor in tensors}):
        raise ArtifactError(
            f"imatrix: has an entry for {foreign[0]}, which the model has not; it is of "
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
                f"imatrix: no entry for {tensor.name}, and {min(needy).name} is garbage without "
                "one; compute one with `reap2gguf imatrix`"
            )
