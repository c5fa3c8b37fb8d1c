"""Where the hidden states of all rows wait between two layers.

A spool is an array (positions, H) of the computing dtype: on the computing device, in pinned host
memory, or in a file. While a batch computes, the latter two load the next batch and store the
previous one, on streams and threads of their own. The file is read and written by position and
never mapped: a full disk is then an error that can be reported, and its pages do not count as
memory of the process.

Memory on the device, besides the array: four batches for host and file spools.
"""

from __future__ import annotations

import os
import tempfile
from abc import ABC, abstractmethod
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from reap2gguf.atomic import reserve
from reap2gguf.errors import OutputError, UsageError
from reap2gguf.observing.compute.kernels import copy_if

Span = tuple[int, int]  # of positions: the first, and the one after the last


class Spool(ABC):
    """Hidden states by position."""

    def __init__(self, n_positions: int, width: int, dtype: torch.dtype) -> None:
        self.shape = (n_positions, width)
        self.dtype = dtype

    @property
    def n_bytes(self) -> int:
        """Bytes of all hidden states."""
        return self.shape[0] * self.shape[1] * self.dtype.itemsize

    @abstractmethod
    def load(self, span: Span, following: Span | None = None) -> Tensor:
        """Hidden states (n, H) of a span, on the device; `following` will be loaded next."""

    @abstractmethod
    def store(self, span: Span, hidden: Tensor) -> None:
        """Replace the hidden states of a span by `hidden` (n, H)."""

    def replace(self, span: Span, wanted: Tensor, output: Tensor, hidden: Tensor) -> None:
        """Store `output` if the flag `wanted` is true, else the span's old content `hidden`."""
        self.store(span, torch.where(wanted, output, hidden))

    def flush(self) -> None:  # noqa: B027, nothing to do where nothing moves
        """Wait until everything stored can be loaded again: between two layers."""

    def close(self) -> None:  # noqa: B027
        """Free memory, threads and files."""


class DeviceSpool(Spool):
    """On the computing device: nothing is copied to or from the host."""

    def __init__(
        self, n_positions: int, width: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(n_positions, width, dtype)
        self._held = torch.empty(self.shape, dtype=dtype, device=device)

    def load(self, span: Span, following: Span | None = None) -> Tensor:
        return self._held[span[0] : span[1]]

    def store(self, span: Span, hidden: Tensor) -> None:
        self._held[span[0] : span[1]].copy_(hidden)

    def replace(self, span: Span, wanted: Tensor, output: Tensor, hidden: Tensor) -> None:
        if output.is_cuda:
            copy_if(wanted, output, self._held[span[0] : span[1]])
        else:
            super().replace(span, wanted, output, hidden)


class PinnedSpool(Spool):
    """In pinned host memory, which a GPU reads and writes by itself."""

    def __init__(
        self, n_positions: int, width: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(n_positions, width, dtype)
        n_bytes = n_positions * width * dtype.itemsize
        try:
            # torch's threads touch the pages first: that is most of the work of pinning them
            self._held = torch.empty(self.shape, dtype=dtype).fill_(0)
            if n_bytes:
                _call_cuda("cudaHostRegister", self._held.data_ptr(), n_bytes, 0)
        except RuntimeError as error:
            raise UsageError(
                f"cannot allocate and pin {n_bytes:,} bytes of RAM for activations; use --spool "
                "disk, or fewer --samples"
            ) from error
        self._lane = _Lane(device)

    def load(self, span: Span, following: Span | None = None) -> Tensor:
        # the host is a batch ahead of the GPU, so this copy is done when the GPU needs it
        return self._lane.bring(self._host(span))

    def store(self, span: Span, hidden: Tensor) -> None:
        self._lane.send(hidden, self._host(span))

    def flush(self) -> None:
        self._lane.drain()

    def close(self) -> None:
        self._lane.drain()
        if self._held.numel():
            _call_cuda("cudaHostUnregister", self._held.data_ptr())

    def _host(self, span: Span) -> Tensor:
        return self._held[span[0] : span[1]]


def _call_cuda(name: str, *arguments: int) -> None:
    """A function of CUDA's runtime; RuntimeError if it fails."""
    runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    torch.cuda.check_error(int(getattr(runtime, name)(*arguments)))


class _Lane:
    """Copies between pinned memory and a GPU while the GPU computes."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._inward = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._outward = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._leaving: list[torch.cuda.Event] = []

    def bring(self, source: Tensor) -> Tensor:
        """A copy on the device, for which the computing stream waits."""
        with torch.cuda.stream(self._inward):
            hidden = source.to(self._device, non_blocking=True)
        computing = torch.cuda.current_stream(self._device)
        computing.wait_stream(self._inward)
        hidden.record_stream(computing)  # else its memory may be reused too early
        return hidden

    def send(self, hidden: Tensor, target: Tensor) -> torch.cuda.Event:
        """Start a copy to the host; at most two run at a time, which limits the memory."""
        if len(self._leaving) >= 2:
            self._leaving.pop(0).synchronize()
        self._outward.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._outward):
            target.copy_(hidden, non_blocking=True)
            gone = torch.cuda.Event()  # type: ignore[no-untyped-call]
            gone.record(self._outward)
        hidden.record_stream(self._outward)
        self._leaving.append(gone)
        return gone

    def drain(self) -> None:
        """Wait until every copy to the host is done."""
        while self._leaving:
            self._leaving.pop(0).synchronize()


class FileSpool(Spool):
    """In an unnamed file of a folder; one thread prefetches, another writes."""

    def __init__(
        self, n_positions: int, width: int, dtype: torch.dtype, device: torch.device, folder: Path
    ) -> None:
        super().__init__(n_positions, width, dtype)
        self._row_bytes = width * dtype.itemsize
        self._pinned = device.type == "cuda"
        self._lane = _Lane(device) if self._pinned else None
        self._file = _reserve(folder, n_positions * self._row_bytes)
        self._folder = folder
        self._reader = ThreadPoolExecutor(1, "spool-read")
        self._writer = ThreadPoolExecutor(1, "spool-write")
        self._prefetched: tuple[Span, Future[Tensor]] | None = None
        self._writing: list[Future[None]] = []

    def load(self, span: Span, following: Span | None = None) -> Tensor:
        ready, self._prefetched = self._prefetched, None
        matches = ready is not None and ready[0] == span
        host = ready[1].result() if ready and matches else self._read(span)
        if following is not None:
            self._prefetched = (following, self._reader.submit(self._read, following))
        return host if self._lane is None else self._lane.bring(host)

    def store(self, span: Span, hidden: Tensor) -> None:
        while len(self._writing) >= 2:
            self._writing.pop(0).result()
        if self._lane is None:
            self._writing.append(self._writer.submit(self._write, span, hidden, None))
            return
        host = torch.empty(hidden.shape, dtype=self.dtype, pin_memory=True)
        gone = self._lane.send(hidden, host)
        self._writing.append(self._writer.submit(self._write, span, host, gone))

    def flush(self) -> None:
        while self._writing:
            self._writing.pop(0).result()
        if self._prefetched is not None:
            self._prefetched[1].result()
            self._prefetched = None
        if self._lane is not None:
            self._lane.drain()

    def close(self) -> None:
        self._reader.shutdown(cancel_futures=True)
        self._writer.shutdown(cancel_futures=True)
        self._file.close()

    def _read(self, span: Span) -> Tensor:
        n_rows = span[1] - span[0]
        host = torch.empty(n_rows, self.shape[1], dtype=self.dtype, pin_memory=self._pinned)
        view = host.view(torch.uint8).numpy().reshape(-1).data
        self._move(os.preadv, view, span[0] * self._row_bytes, "read")
        return host

    def _write(self, span: Span, host: Tensor, gone: torch.cuda.Event | None) -> None:
        if gone is not None:
            gone.synchronize()
        view = host.contiguous().view(torch.uint8).numpy().reshape(-1).data
        self._move(os.pwritev, view, span[0] * self._row_bytes, "written")

    def _move(self, call: object, view: memoryview, position: int, verb: str) -> None:
        done = 0
        while done < len(view):
            try:
                count = call(self._file.fileno(), [view[done:]], position + done)  # type: ignore[operator]
            except OSError as error:
                raise OutputError(
                    f"{self._folder}: activations cannot be {verb} ({error.strerror}); free some "
                    "space there, or use --spool host"
                ) from error
            if count == 0:
                raise OutputError(f"{self._folder}: the file of activations was truncated")
            done += count


def _reserve(folder: Path, n_bytes: int) -> BinaryIO:
    """An unnamed file of this length. Raises OutputError if the disk has no room for it."""
    try:
        file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115, closed by the spool
        try:
            reserve(file.fileno(), n_bytes)
        except OSError:
            file.close()
            raise
    except OSError as error:
        raise OutputError(
            f"{folder}: no room for {n_bytes:,} bytes of activations ({error.strerror}); free some "
            "space there, or use fewer --samples"
        ) from error
    return file


def open_spool(
    kind: str, shape: tuple[int, int], dtype: torch.dtype, device: torch.device, folder: Path
) -> Spool:
    """A spool of `shape` (positions, H); `kind` is device, host or disk (in `folder`).

    Raises OutputError if the disk is too full, UsageError if the host's memory is too small.
    """
    if kind == "device":
        return DeviceSpool(*shape, dtype, device)
    if kind == "host":
        return PinnedSpool(*shape, dtype, device)
    return FileSpool(*shape, dtype, device, folder)
