"""Checkpoint to GGUF files: every tensor is read once, for however many files.

The work is cut into pieces of whole rows of one matrix. A piece is read, widened to float32 and
transformed, quantized once for each distinct type that the files want, and written at its place in
each file. Pieces are independent, so threads share them; libggml runs without the interpreter's
lock. No intermediate file is written. Memory: about `threads` pieces of 16 MiB with their
quantized forms, plus the largest matrix that a transform needs whole.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType

from reap2gguf.artifacts.gguf_header import row_bytes
from reap2gguf.artifacts.imatrix import Imatrix
from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.errors import ArtifactError, CheckpointError, OutputError
from reap2gguf.export.header import GgufLayout, HeaderFacts, write_header
from reap2gguf.ggml import NEEDS_IMPORTANCE, Ggml, load_ggml
from reap2gguf.models.description import GgufTensor, Slab
from reap2gguf.models.slabs import read_rows, row_pieces, rows_per_matrix
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
    importance = _importance(tensors, outputs, imatrix)
    ggml = load_ggml()
    with ExitStack() as stack:
        files = [_open(stack, checkpoint, tensors, output) for output in outputs]
        total = sum(prod(tensor.shape) for tensor in tensors) * len(outputs)
        task = stack.enter_context(progress.task("Writing GGUF", total, "weights"))
        job = _Job(checkpoint, ggml, files, importance, task)
        _run_all(job, _pieces(tensors), n_threads)
        for file in files:
            os.fsync(file.descriptor)


@dataclass(frozen=True)
class _Job:
    checkpoint: Checkpoint
    ggml: Ggml
    files: Sequence[_OpenFile]
    importance: Mapping[str, Floats]
    task: Task

    def run(self, piece: _Piece) -> None:
        """Read one piece and write it, quantized, to every file."""
        tensor = piece.tensor
        rows = read_rows(self.checkpoint, tensor, piece.slab, piece.first, piece.last)
        if not np.isfinite(rows).all():
            raise CheckpointError(
                f"{self.checkpoint.folder}: {piece.slab.stored!r} holds NaN or infinite values"
            )
        weights = self.importance.get(tensor.name)
        column_weights = None if weights is None else weights[piece.matrix]
        done: dict[GGMLQuantizationType, npt.NDArray[np.uint8]] = {}
        for file in self.files:
            kind = file.kinds[tensor.name]
            if kind not in done:
                done[kind] = self._quantize(piece, rows, kind, column_weights)
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
        _reserve(descriptor, layout.n_bytes)
    except OSError as error:
        raise OutputError(
            f"{output.path}: no room for {layout.n_bytes:,} bytes ({error.strerror}); free some "
            "or pass another --output"
        ) from error
    return _OpenFile(descriptor, layout, output.header.kinds)


def _reserve(descriptor: int, n_bytes: int) -> None:
    os.ftruncate(descriptor, n_bytes)
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(descriptor, 0, n_bytes)
    except OSError as error:
        # some file systems cannot reserve; the length is set, and writes will tell
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise


def _write_at(descriptor: int, data: npt.NDArray[np.uint8], position: int) -> None:
    view = data.reshape(-1).data
    done = 0
    while done < len(view):
        try:
            done += os.pwrite(descriptor, view[done:], position + done)
        except OSError as error:
            raise OutputError(f"writing the GGUF failed ({error.strerror})") from error


def _importance(
    tensors: Sequence[GgufTensor], outputs: Sequence[GgufOutput], imatrix: Imatrix | None
) -> dict[str, Floats]:
    """Mean squares (n_matrices, n_columns) per tensor that has any, checked before the work."""
    if imatrix is not None:
        known = {tensor.name for tensor in tensors}
        if foreign := sorted(imatrix.entries.keys() - known):
            raise ArtifactError(
                f"imatrix: has an entry for {foreign[0]}, which the model has not; it is of "
                "another model"
            )
    found: dict[str, Floats] = {}
    for tensor in tensors:
        entry = imatrix.entries.get(tensor.name) if imatrix else None
        if entry is not None:
            values = entry.importance()
            if values.size != tensor.n_matrices * tensor.n_columns:
                raise ArtifactError(
                    f"imatrix: {tensor.name} has {values.size} values, expected "
                    f"{tensor.n_matrices} x {tensor.n_columns}; it is of another model, such as "
                    "the one before pruning"
                )
            found[tensor.name] = values.reshape(tensor.n_matrices, tensor.n_columns)
            continue
        for output in outputs:
            kind = output.header.kinds[tensor.name]
            if kind in NEEDS_IMPORTANCE:
                raise ArtifactError(
                    f"imatrix: no entry for {tensor.name}, and {kind.name} is garbage without one; "
                    "compute one with `reap2gguf imatrix`"
                )
    return found
