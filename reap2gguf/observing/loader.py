"""Reads the weights of one layer while another computes.

A layer is a set of tensors, each assembled from bytes of stored tensors. Threads read the bytes: on
a CPU straight into the tensors, for a GPU into small pinned buffers from which they are copied on a
stream of their own (`readers.py`). Memory: the tensors that are asked for and not yet taken, and
for a GPU the threads' buffers.

Several GPUs of one machine share the reading: each process reads its part of a set, and the parts
are exchanged from GPU to GPU.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from reap2gguf.errors import CheckpointError
from reap2gguf.observing.readers import BUFFER_BYTES, Readers

if TYPE_CHECKING:
    from reap2gguf.checkpoint.weights import Weights

TORCH_TYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_ALIGNMENT = 256  # bytes, of the tensors of a set that several processes read


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


class Done(Protocol):
    """What runs on a GPU."""

    def wait(self) -> object:
        """Let the current stream wait for it."""


class Sharers(Protocol):
    """The processes of this machine that read the same weights, each for a GPU of its own."""

    @property
    def number(self) -> int:
        """This process's number among them."""

    @property
    def count(self) -> int:
        """How many there are."""

    def exchange(self, whole: Tensor) -> Done:
        """Begin to give and get the parts of `whole`; every process has its own part of it."""


@dataclass
class _Asked:
    """A set of tensors on its way."""

    tensors: Tensors
    futures: list[Future[None]]
    whole: Tensor | None  # the memory of all tensors, if several processes read them
    exchange: Done | None = None  # once it has begun


class WeightLoader:
    """Reads sets of tensors in the background."""

    def __init__(
        self,
        weights: Weights,
        device: torch.device,
        readers: Readers,
        sharers: Sharers | None = None,
    ) -> None:
        """`readers` may read for several loaders; the caller closes them."""
        self._sharers = sharers
        self.seconds_waited = 0.0  # in `take`
        self._weights = weights
        self._device = device
        self._readers = readers
        self._stream = self._readers.stream
        self._asked: dict[str, _Asked] = {}

    def ask(self, key: str, targets: Mapping[str, Target], shared: bool = False) -> None:
        """Begin to read a set of tensors, under a name of the caller's.

        shared: all processes ask for the same sets, and take them, in the same order
        """
        whole = None
        with torch.inference_mode(False):  # threads that are in no such mode fill them
            if shared and self._sharers is not None:
                whole, tensors = _in_one(targets, self._device, self._sharers.count)
            else:
                tensors = {
                    name: torch.empty(target.shape, dtype=target.dtype, device=self._device)
                    for name, target in targets.items()
                }
        if self._stream is not None:
            # their memory may still be in use by what was computed before
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        futures = [
            self._readers.pool.submit(self._fill, tensors[name], runs)
            for name, target in targets.items()
            for runs in _buffers(self._own(target, tensors[name], whole))
        ]
        self._asked[key] = _Asked(tensors, futures, whole)

    def _own(self, target: Target, tensor: Tensor, whole: Tensor | None) -> Sequence[ByteRun]:
        """The runs of a target that this process reads."""
        if whole is None or self._sharers is None:
            return target.runs
        part = len(whole) // self._sharers.count
        # in elements of the target, from its first one
        first = part * self._sharers.number - (tensor.data_ptr() - whole.data_ptr())
        size = target.dtype.itemsize
        return list(_within(target.runs, first // size, (first + part) // size))

    def complete(self, key: str) -> None:
        """Wait until a set was read, and let processes that share it begin to exchange it.

        What a GPU computes meanwhile is not disturbed. Nothing happens if it was not asked for.
        """
        asked = self._asked.get(key)
        if asked is None or asked.whole is None or asked.exchange is not None:
            return
        assert self._sharers is not None
        self._wait_beside_computing(asked.futures)
        for future in asked.futures:
            if future.exception() is not None:
                return  # `take` raises it
        with torch.cuda.stream(self._stream):
            asked.exchange = self._sharers.exchange(asked.whole)

    def _wait_beside_computing(self, futures: Sequence[Future[None]]) -> None:
        """Wait until all is read; what counts as waiting is the time that the GPU is idle."""
        idle_from: float | None = None
        while wait(futures, timeout=0.01).not_done:
            if idle_from is None and (
                self._stream is None or torch.cuda.current_stream(self._device).query()
            ):
                idle_from = time.monotonic()
        if idle_from is not None:
            self.seconds_waited += time.monotonic() - idle_from

    def has(self, key: str) -> bool:
        """Whether a set was asked for and not yet taken."""
        return key in self._asked

    def take(self, key: str) -> Tensors:
        """A set that was asked for, once it is complete; CheckpointError if it cannot be read."""
        self.complete(key)
        begun = time.monotonic()
        asked = self._asked.pop(key)
        try:
            for future in asked.futures:
                future.result()
        except BaseException:
            # running copies must not outlive the tensors; those that have not begun are dropped
            started = [future for future in asked.futures if not future.cancel()]
            with self._weights.without_fetching():
                wait(started)
            raise
        finally:
            self._finish_copies()
        if asked.exchange is not None:
            asked.exchange.wait()
        self.seconds_waited += time.monotonic() - begun
        return asked.tensors

    def close(self) -> None:
        """Stop reading."""
        futures = [future for asked in self._asked.values() for future in asked.futures]
        with self._weights.without_fetching():  # or threads that read would wait for it
            wait([future for future in futures if not future.cancel()])
        self._finish_copies()
        self._asked.clear()

    def _finish_copies(self) -> None:
        if self._stream is not None:
            self._stream.synchronize()

    def _fill(self, tensor: Tensor, runs: Sequence[ByteRun]) -> None:
        if self._stream is not None:
            self._fill_device(tensor, runs)
            return
        for run in runs:
            target = _part_of(tensor, run)
            if run.dtype == target.dtype and run.columns is None:
                self._read(run, target)
            else:
                raw = torch.empty(run.n_values, dtype=run.dtype)
                self._read(run, raw)
                target.copy_(_turned(raw, run))

    def _fill_device(self, tensor: Tensor, runs: Sequence[ByteRun]) -> None:
        """Through one of two buffers, so that a thread reads into one while the other is copied.

        Several runs follow one another in the target, and are copied as one.
        """
        assert self._stream is not None
        # a new thread would otherwise pin its buffers for the first GPU
        with torch.cuda.device(self._device):
            buffer, copied = self._readers.next_buffer()
            copied.synchronize()
            run = replace(runs[0], n_values=sum(run.n_values for run in runs))
            target = _part_of(tensor, run)
            values = buffer[: run.n_values * run.dtype.itemsize].view(run.dtype)
            begin = 0
            for part in runs:
                self._read(part, values[begin : begin + part.n_values])
                begin += part.n_values
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


def _in_one(
    targets: Mapping[str, Target], device: torch.device, n_parts: int
) -> tuple[Tensor, Tensors]:
    """Memory for all tensors, bytes that divide into equal parts, and the tensors in it."""
    places: dict[str, int] = {}
    end = 0
    for name, target in targets.items():
        places[name] = end
        end += -(-target_bytes({name: target}) // _ALIGNMENT) * _ALIGNMENT
    step = n_parts * _ALIGNMENT
    whole = torch.empty(-(-end // step) * step, dtype=torch.uint8, device=device)
    tensors = {
        name: whole[place : place + target_bytes({name: targets[name]})]
        .view(targets[name].dtype)
        .view(targets[name].shape)
        for name, place in places.items()
    }
    return whole, tensors


def _within(runs: Iterable[ByteRun], first: int, last: int) -> Iterator[ByteRun]:
    """What of the runs lies in the elements [first, last) of their target.

    Runs that go to columns are not cut: what they write outside is the same for every process.
    """
    for run in runs:
        end = run.target_start + run.n_values
        if run.columns is not None:
            n_columns = run.n_values // run.columns.width
            n_rows = len(range(*run.columns.taken))
            end = run.target_start + (n_rows - 1) * run.columns.target_width + n_columns
        begin, stop = max(run.target_start, first), min(end, last)
        if begin >= stop:
            continue
        if run.columns is not None:
            yield run
            continue
        skipped = (begin - run.target_start) * run.dtype.itemsize
        yield replace(
            run, first_byte=run.first_byte + skipped, n_values=stop - begin, target_start=begin
        )


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


def _buffers(runs: Iterable[ByteRun]) -> Iterator[list[ByteRun]]:
    """Runs in groups that follow one another in the target and fit a buffer together."""
    group: list[ByteRun] = []
    n_bytes = 0
    for run in _buffer_sized(runs):
        size = run.n_values * run.dtype.itemsize
        if group and (
            n_bytes + size > BUFFER_BYTES
            or run.columns is not None
            or group[-1].columns is not None
            or run.dtype != group[-1].dtype
            or run.target_start != group[-1].target_start + group[-1].n_values
        ):
            yield group
            group, n_bytes = [], 0
        group.append(run)
        n_bytes += size
    if group:
        yield group


def _buffer_sized(runs: Iterable[ByteRun]) -> Iterator[ByteRun]:
    """The same values in as few runs as possible, each of which fits a buffer."""
    for run in _joined(runs):
        width = 1 if run.columns is None else run.columns.width
        step = max(1, BUFFER_BYTES // run.dtype.itemsize // width) * width
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
