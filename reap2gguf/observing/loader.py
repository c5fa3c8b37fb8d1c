"""Reads the weights of one layer while another computes.

A layer is a set of tensors, each assembled from bytes of stored tensors. Threads read the bytes: on
a CPU straight into the tensors, for a GPU into small pinned buffers from which they are copied on a
stream of their own. Memory: the tensors that are asked for and not yet taken, and for a GPU two
buffers of 16 MiB per thread.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from reap2gguf.errors import CheckpointError

if TYPE_CHECKING:
    from reap2gguf.checkpoint.weights import Weights

TORCH_TYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_BUFFER_BYTES = 2**24


@dataclass(frozen=True)
class Columns:
    """How stored rows become columns of a target's matrix, where that is stored transposed."""

    width: int  # values per stored row
    taken: tuple[int, int, int]  # begin, end and step of those that the target has
    target_width: int  # values per row of the target


@dataclass(frozen=True)
class ByteRun:
    """Neighbouring values of a stored tensor, and where in a target they go."""

    stored: str
    dtype: torch.dtype  # as stored
    first_byte: int
    n_values: int
    target_start: int  # the target's element that the first value is
    columns: Columns | None = None  # the values are whole stored rows, and go to columns


@dataclass(frozen=True)
class Target:
    """A tensor to be read: its shape, its type, and the stored values that cover it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    runs: tuple[ByteRun, ...]


Tensors = dict[str, Tensor]


class WeightLoader:
    """Reads sets of tensors in the background."""

    def __init__(self, weights: Weights, device: torch.device, n_threads: int) -> None:
        self.seconds_waited = 0.0  # in `take`
        self._weights = weights
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
            self._pool.submit(self._fill, tensors[name], run)
            for name, target in targets.items()
            for run in _buffer_sized(target.runs)
        ]
        self._asked[key] = (tensors, futures)

    def has(self, key: str) -> bool:
        """Whether a set was asked for and not yet taken."""
        return key in self._asked

    def take(self, key: str) -> Tensors:
        """A set that was asked for, once it is complete; CheckpointError if it cannot be read."""
        begun = time.monotonic()
        tensors, futures = self._asked.pop(key)
        try:
            for future in futures:
                future.result()
        except BaseException:
            # running copies must not outlive the tensors; those that have not begun are dropped
            started = [future for future in futures if not future.cancel()]
            with self._weights.without_fetching():
                wait(started)
            raise
        finally:
            self._finish_copies()
        self.seconds_waited += time.monotonic() - begun
        return tensors

    def close(self) -> None:
        """Stop reading."""
        with self._weights.without_fetching():  # or threads that read would wait for it
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

    def _fill(self, tensor: Tensor, run: ByteRun) -> None:
        target = _part_of(tensor, run)
        if self._stream is not None:
            self._fill_device(target, run)
        elif run.dtype == target.dtype and run.columns is None:
            self._read(run, target)
        else:
            raw = torch.empty(run.n_values, dtype=run.dtype)
            self._read(run, raw)
            target.copy_(_turned(raw, run))

    def _fill_device(self, target: Tensor, run: ByteRun) -> None:
        """Through one of two buffers, so that a thread reads into one while the other is copied."""
        assert self._stream is not None
        # a new thread would otherwise pin its buffers for the first GPU
        with torch.cuda.device(self._device):
            if not hasattr(self._buffers, "pair"):
                self._buffers.pair = [self._new_buffer(), self._new_buffer()]
            self._buffers.pair.reverse()
            buffer, copied = self._buffers.pair[0]
            copied.synchronize()
            values = buffer[: run.n_values * run.dtype.itemsize].view(run.dtype)
            self._read(run, values)
            with torch.cuda.stream(self._stream):
                if run.dtype != target.dtype or run.columns is not None:
                    values = values.to(self._device, non_blocking=True)
                target.copy_(_turned(values, run), non_blocking=True)
                copied.record(self._stream)

    def _read(self, run: ByteRun, values: Tensor) -> None:
        buffer = values.view(torch.uint8).numpy()
        self._weights.read_bytes(run.stored, run.first_byte, buffer)


def _part_of(tensor: Tensor, run: ByteRun) -> Tensor:
    """The elements of a target that a run fills, in the shape of `_turned`."""
    flat = tensor.view(-1)
    if run.columns is None:
        return flat[run.target_start : run.target_start + run.n_values]
    shape = (len(range(*run.columns.taken)), run.n_values // run.columns.width)
    return flat.as_strided(shape, (run.columns.target_width, 1), run.target_start)


def _turned(values: Tensor, run: ByteRun) -> Tensor:
    """A run's values as the target has them."""
    if run.columns is None:
        return values
    return values.view(-1, run.columns.width)[:, slice(*run.columns.taken)].T


def target_bytes(targets: Mapping[str, Target]) -> int:
    """Bytes of a set of tensors."""
    return sum(prod(target.shape) * target.dtype.itemsize for target in targets.values())


def stored_type(weights: Weights, name: str) -> torch.dtype:
    """torch's type of a stored tensor; CheckpointError for one that is not read."""
    stored = weights.tensors[name].dtype
    if stored not in TORCH_TYPES:
        raise CheckpointError(
            f"tensor {name!r} is stored as {stored}; BF16, F16 and F32 are read (dequantize the "
            "checkpoint first)"
        )
    return TORCH_TYPES[stored]


def _buffer_sized(runs: Iterable[ByteRun]) -> Iterator[ByteRun]:
    """The same values in as few runs as possible, each of which fits a buffer."""
    for run in _joined(runs):
        width = 1 if run.columns is None else run.columns.width
        step = max(1, _BUFFER_BYTES // run.dtype.itemsize // width) * width
        for first in range(0, run.n_values, step):
            yield replace(
                run,
                first_byte=run.first_byte + first * run.dtype.itemsize,
                n_values=min(step, run.n_values - first),
                target_start=run.target_start + first // width,
            )


def _joined(runs: Iterable[ByteRun]) -> Iterator[ByteRun]:
    """Runs that are neighbours on both sides, made one: all of a fused tensor's experts are."""
    joined: ByteRun | None = None
    for run in sorted(runs, key=lambda run: run.target_start):
        if (
            joined is not None
            and joined.columns is None
            and run.columns is None
            and run.stored == joined.stored
            and run.target_start == joined.target_start + joined.n_values
            and run.first_byte == joined.first_byte + joined.n_values * joined.dtype.itemsize
        ):
            joined = replace(joined, n_values=joined.n_values + run.n_values)
            continue
        if joined is not None:
            yield joined
        joined = run
    if joined is not None:
        yield joined
