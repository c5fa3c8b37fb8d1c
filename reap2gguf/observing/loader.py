"""Reads the weights of one layer while another computes.

A layer is a set of tensors, each pieced together from bytes of stored tensors. Threads read the
pieces: on a CPU straight into the tensors, for a GPU into small pinned buffers from which the bytes
are copied on a stream of their own. Memory: the tensors that are asked for and not yet taken, and
for a GPU two buffers of 16 MiB a thread.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.errors import CheckpointError

TORCH_TYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_BUFFER_BYTES = 2**24


@dataclass(frozen=True)
class Piece:
    """Bytes of a stored tensor that lie together, and the element of a target they begin at."""

    stored: str
    dtype: torch.dtype  # as stored
    first_byte: int
    n_values: int
    place: int


@dataclass(frozen=True)
class Target:
    """A tensor to be read: its shape, its type, and what covers it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: tuple[Piece, ...]


Tensors = dict[str, Tensor]


class WeightLoader:
    """Reads sets of tensors in the background."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device, n_threads: int) -> None:
        self.seconds_waited = 0.0  # by whoever takes
        self._checkpoint = checkpoint
        self._device = device
        self._pool = ThreadPoolExecutor(n_threads, "weights")
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._buffers = threading.local()
        self._asked: dict[str, tuple[Tensors, list[Future[None]]]] = {}

    def ask(self, key: str, targets: Mapping[str, Target]) -> None:
        """Begin to read a set of tensors, under a name of the caller's."""
        with torch.inference_mode(False):  # threads that are in no such mode fill them
            tensors = {
                name: torch.empty(target.shape, dtype=target.dtype, device=self._device)
                for name, target in targets.items()
            }
        if self._stream is not None:
            # their memory may still be in use by what was computed before
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        futures = [
            self._pool.submit(self._fill, tensors[name], piece)
            for name, target in targets.items()
            for piece in _small(target.pieces)
        ]
        self._asked[key] = (tensors, futures)

    def has(self, key: str) -> bool:
        """Whether a set was asked for and not yet taken."""
        return key in self._asked

    def take(self, key: str) -> Tensors:
        """A set that was asked for, once it is whole; CheckpointError if it cannot be read."""
        begun = time.monotonic()
        tensors, futures = self._asked.pop(key)
        try:
            for future in futures:
                future.result()
        except BaseException:
            # copies under way must not outlive the tensors; what is not under way may be left
            started = [future for future in futures if not future.cancel()]
            with self._checkpoint.without_fetching():
                wait(started)
            raise
        finally:
            self._finish_copies()
        self.seconds_waited += time.monotonic() - begun
        return tensors

    def close(self) -> None:
        """Stop reading."""
        with self._checkpoint.without_fetching():  # or threads that read would wait for it
            self._pool.shutdown(cancel_futures=True)
        self._finish_copies()
        self._asked.clear()

    def _finish_copies(self) -> None:
        if self._stream is not None:
            self._stream.synchronize()

    @staticmethod
    def _new_buffer() -> tuple[Tensor, torch.cuda.Event]:
        buffer = torch.empty(_BUFFER_BYTES, dtype=torch.uint8, pin_memory=True)
        return buffer, torch.cuda.Event()  # type: ignore[no-untyped-call]

    def _fill(self, tensor: Tensor, piece: Piece) -> None:
        target = tensor.view(-1)[piece.place : piece.place + piece.n_values]
        if self._stream is not None:
            self._fill_device(target, piece)
        elif piece.dtype == target.dtype:
            self._read(piece, target)
        else:
            raw = torch.empty(piece.n_values, dtype=piece.dtype)
            self._read(piece, raw)
            target.copy_(raw)

    def _fill_device(self, target: Tensor, piece: Piece) -> None:
        """Through one of two buffers, so that a thread reads into one while the other is copied."""
        assert self._stream is not None
        # a new thread would otherwise pin its buffers for the first GPU
        with torch.cuda.device(self._device):
            if not hasattr(self._buffers, "pair"):
                self._buffers.pair = [self._new_buffer(), self._new_buffer()]
            self._buffers.pair.reverse()
            buffer, copied = self._buffers.pair[0]
            copied.synchronize()
            values = buffer[: piece.n_values * piece.dtype.itemsize].view(piece.dtype)
            self._read(piece, values)
            with torch.cuda.stream(self._stream):
                if piece.dtype != target.dtype:
                    values = values.to(self._device, non_blocking=True)
                target.copy_(values, non_blocking=True)
                copied.record(self._stream)

    def _read(self, piece: Piece, values: Tensor) -> None:
        buffer = values.view(torch.uint8).numpy()
        self._checkpoint.read_bytes(piece.stored, piece.first_byte, buffer)


def target_bytes(targets: Mapping[str, Target]) -> int:
    """Bytes of a set of tensors."""
    return sum(prod(target.shape) * target.dtype.itemsize for target in targets.values())


def stored_type(checkpoint: Checkpoint, name: str) -> torch.dtype:
    """torch's type of a stored tensor; CheckpointError for one that is not read."""
    stored = checkpoint.tensors[name].dtype
    if stored not in TORCH_TYPES:
        raise CheckpointError(
            f"tensor {name!r} is stored as {stored}; BF16, F16 and F32 are read (dequantize the "
            "checkpoint first)"
        )
    return TORCH_TYPES[stored]


def _small(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """Pieces that lie together on both sides joined, then cut to what a buffer holds."""
    for piece in _joined(pieces):
        step = _BUFFER_BYTES // piece.dtype.itemsize
        for first in range(0, piece.n_values, step):
            yield replace(
                piece,
                first_byte=piece.first_byte + first * piece.dtype.itemsize,
                n_values=min(step, piece.n_values - first),
                place=piece.place + first,
            )


def _joined(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """Fused experts are one run of bytes, which the pieces' order does not show."""
    run: Piece | None = None
    for piece in sorted(pieces, key=lambda piece: piece.place):
        if (
            run is not None
            and piece.stored == run.stored
            and piece.place == run.place + run.n_values
            and piece.first_byte == run.first_byte + run.n_values * run.dtype.itemsize
        ):
            run = replace(run, n_values=run.n_values + piece.n_values)
            continue
        if run is not None:
            yield run
        run = piece
    if run is not None:
        yield run
