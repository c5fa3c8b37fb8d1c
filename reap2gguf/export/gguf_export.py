"""Checkpoint to GGUF files: every tensor is read once, for however many files.

The work is cut into pieces of whole rows of one matrix. A piece is read, widened to float32 and
transformed, quantized once for each distinct type that the files want, and written at its place in
each file. Pieces are independent: a thread that is free takes the next one, in the order of the
files, and libggml runs without the interpreter's lock, so that every thread works from the first
piece to the last. The kernel is asked for the bytes of the pieces to come, so that no thread waits
for the disk. No intermediate file is written.

Memory: a thread holds one piece: at most 16 MiB as float32, at most as much as it was stored, and
its quantized forms, 2 to 16 MiB for each distinct type. A matrix that is transformed is one piece,
whatever its size. Beside the pieces there is the imatrix: 4 bytes a column.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType

from reap2gguf.artifacts.gguf_header import row_bytes
from reap2gguf.artifacts.imatrix import Imatrix, ImatrixEntry
from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.disk import reserve
from reap2gguf.errors import ArtifactError, CheckpointError, OutputError
from reap2gguf.export.header import GgufLayout, HeaderFacts, write_header
from reap2gguf.ggml import NEEDS_IMPORTANCE, Ggml, load_ggml
from reap2gguf.models.description import GgufTensor, Slab
from reap2gguf.models.slabs import expect_rows, read_rows, row_pieces, rows_per_matrix
from reap2gguf.progress import Progress, Task

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class GgufOutput:
    """One file to write."""

    path: Path
    header: HeaderFacts


@dataclass(frozen=True)
class _OpenFile:
    descriptor: int
    layout: GgufLayout
    kinds: Mapping[str, GGMLQuantizationType]


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
) -> None:
    """Write all `outputs` in one pass over the checkpoint, each complete when this returns.

    Raises ArtifactError if the imatrix does not fit, CheckpointError if a stored value is not
    finite, OutputError if the disk is full.
    """
    _check_imatrix(tensors, outputs, imatrix)
    ggml = load_ggml()
    with ExitStack() as stack:
        files = [_open(stack, checkpoint, tensors, output) for output in outputs]
        total = sum(prod(tensor.shape) for tensor in tensors) * len(outputs)
        task = stack.enter_context(progress.task("Writing GGUF", total, "weights"))
        job = _Job(checkpoint, ggml, files, imatrix.entries if imatrix else {}, task)
        pieces = _fetched_ahead(checkpoint, _pieces(tensors), 2 * n_threads)
        _run_all(job, pieces, n_threads)
        for file in files:
            with _refusals_told():
                os.fsync(file.descriptor)


@dataclass(frozen=True)
class _Job:
    checkpoint: Checkpoint
    ggml: Ggml
    files: Sequence[_OpenFile]
    importance: Mapping[str, ImatrixEntry]
    task: Task

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
            kind = file.kinds[tensor.name]
            if kind not in done:
                done[kind] = self._quantize(piece, rows, kind, weights)
            place = piece.first_row_in_tensor * row_bytes(kind, tensor.n_columns)
            _write_at(file.descriptor, done[kind], file.layout.offsets[tensor.name] + place)
            self.task.advance(rows.size)

    def _quantize(
        self, piece: _Piece, rows: Floats, kind: GGMLQuantizationType, weights: Floats | None
    ) -> npt.NDArray[np.uint8]:
        try:
            return self.ggml.quantize(rows, kind, weights)
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


def _run_all(job: _Job, pieces: Iterator[_Piece], n_threads: int) -> None:
    """Run every piece: a thread takes the next as soon as it is free, so none waits for another."""
    turn, failed = threading.Lock(), threading.Event()

    def take() -> _Piece | None:
        with turn:
            return None if failed.is_set() else next(pieces, None)

    def work() -> None:
        while (piece := take()) is not None:
            job.run(piece)

    with ThreadPoolExecutor(n_threads) as pool:
        try:
            for worker in as_completed([pool.submit(work) for _ in range(n_threads)]):
                worker.result()
        except BaseException:
            failed.set()  # the other threads end with the piece that they are at
            raise


def _open(
    stack: ExitStack,
    checkpoint: Checkpoint,
    tensors: Sequence[GgufTensor],
    output: GgufOutput,
) -> _OpenFile:
    """Write the header and reserve the file's whole length, so that a full disk shows now."""
    layout = write_header(output.path, checkpoint.folder, tensors, output.header)
    descriptor = os.open(output.path, os.O_RDWR)
    stack.callback(os.close, descriptor)
    try:
        reserve(descriptor, layout.n_bytes)
    except OSError as error:
        raise OutputError(
            f"{output.path}: no room for {layout.n_bytes:,} bytes ({error.strerror}); free some "
            "or pass another --output"
        ) from error
    return _OpenFile(descriptor, layout, output.header.kinds)


def _write_at(descriptor: int, data: npt.NDArray[np.uint8], position: int) -> None:
    view = data.reshape(-1).data
    done = 0
    while done < len(view):
        with _refusals_told():
            done += os.pwrite(descriptor, view[done:], position + done)


@contextmanager
def _refusals_told() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(f"writing the GGUF failed ({error.strerror})") from error


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
        kinds = {output.header.kinds[tensor.name] for output in outputs}
        if entry := entries.get(tensor.name):
            size = tensor.n_matrices * tensor.n_columns
            if entry.sums.size != size or entry.sums.shape[1] % tensor.n_columns:
                raise ArtifactError(
                    f"imatrix: {tensor.name} has {entry.sums.size} values, expected "
                    f"{tensor.n_matrices} x {tensor.n_columns}; it is of another model, such as "
                    "the one before pruning"
                )
        elif needy := kinds & NEEDS_IMPORTANCE:
            raise ArtifactError(
                f"imatrix: no entry for {tensor.name}, and {min(needy).name} is garbage without "
                "one; compute one with `reap2gguf imatrix`"
            )
