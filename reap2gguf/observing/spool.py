"""Where the hidden states of all rows wait between two layers.

A spool is an array (positions, H) of the computing dtype: on the computing device, in pinned host
memory, or in a file. The latter two move the next batch in and the last one out on streams and
threads of their own, while a batch computes. The file is read and written by position and never
mapped: a full disk is then an error that can be said, and the pages belong to no process.

Memory on the device besides the array: for host and file spools, four batches.
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

Place = tuple[int, int]  # first position, and the one after the last


class Spool(ABC):
    """Hidden states by position."""

    def __init__(self, n_positions: int, width: int, dtype: torch.dtype) -> None:
        self.shape = (n_positions, width)
        self.dtype = dtype

    @abstractmethod
    def load(self, place: Place, following: Place | None = None) -> Tensor:
        """Positions of a place, (n, H), on the device; `following` is asked for next."""

    @abstractmethod
    def store(self, place: Place, hidden: Tensor) -> None:
        """Replace positions of a place by `hidden` (n, H)."""

    def flush(self) -> None:  # noqa: B027, nothing to do where nothing moves
        """Wait until everything stored can be loaded again: between two layers."""

    def close(self) -> None:  # noqa: B027
        """Give back what it holds."""


class DeviceSpool(Spool):
    """On the computing device: nothing moves."""

    def __init__(
        self, n_positions: int, width: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(n_positions, width, dtype)
        self._held = torch.empty(self.shape, dtype=dtype, device=device)

    def load(self, place: Place, following: Place | None = None) -> Tensor:
        return self._held[place[0] : place[1]]

    def store(self, place: Place, hidden: Tensor) -> None:
        self._held[place[0] : place[1]].copy_(hidden)


class PinnedSpool(Spool):
    """In host memory that a GPU reads and writes by itself."""

    def __init__(
        self, n_positions: int, width: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(n_positions, width, dtype)
        n_bytes = n_positions * width * dtype.itemsize
        try:
            # threads touch the pages first, which takes most of the time that pinning takes
            self._held = torch.empty(self.shape, dtype=dtype).fill_(0)
            if n_bytes:
                _call_cuda("cudaHostRegister", self._held.data_ptr(), n_bytes, 0)
        except RuntimeError as error:
            raise UsageError(
                f"{n_bytes:,} bytes of host memory for hidden states cannot be had or pinned; pass "
                "--spool disk, or observe fewer --samples"
            ) from error
        self._lane = _Lane(device)

    def load(self, place: Place, following: Place | None = None) -> Tensor:
        # the host runs a batch ahead of the GPU, so this copy is done when its turn comes
        return self._lane.bring(self._host(place))

    def store(self, place: Place, hidden: Tensor) -> None:
        self._lane.send(hidden, self._host(place))

    def flush(self) -> None:
        self._lane.drain()

    def close(self) -> None:
        self._lane.drain()
        if self._held.numel():
            _call_cuda("cudaHostUnregister", self._held.data_ptr())

    def _host(self, place: Place) -> Tensor:
        return self._held[place[0] : place[1]]


def _call_cuda(name: str, *arguments: int) -> None:
    """A function of CUDA's runtime; RuntimeError if it fails."""
    runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    torch.cuda.check_error(int(getattr(runtime, name)(*arguments)))


class _Lane:
    """Copies between pinned memory and a GPU beside its computing."""

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
        hidden.record_stream(computing)  # its memory is not given away before it was used
        return hidden

    def send(self, hidden: Tensor, target: Tensor) -> torch.cuda.Event:
        """Begin a copy to the host; at most two are under way, which bounds the memory."""
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
    """In a nameless file of a folder; a thread reads ahead and another writes behind."""

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
        self._ahead: tuple[Place, Future[Tensor]] | None = None
        self._behind: list[Future[None]] = []

    def load(self, place: Place, following: Place | None = None) -> Tensor:
        ahead, self._ahead = self._ahead, None
        is_here = ahead is not None and ahead[0] == place
        host = ahead[1].result() if ahead and is_here else self._read(place)
        if following is not None:
            self._ahead = (following, self._reader.submit(self._read, following))
        return host if self._lane is None else self._lane.bring(host)

    def store(self, place: Place, hidden: Tensor) -> None:
        while len(self._behind) >= 2:
            self._behind.pop(0).result()
        if self._lane is None:
            self._behind.append(self._writer.submit(self._write, place, hidden, None))
            return
        host = torch.empty(hidden.shape, dtype=self.dtype, pin_memory=True)
        gone = self._lane.send(hidden, host)
        self._behind.append(self._writer.submit(self._write, place, host, gone))

    def flush(self) -> None:
        while self._behind:
            self._behind.pop(0).result()
        if self._ahead is not None:
            self._ahead[1].result()
            self._ahead = None
        if self._lane is not None:
            self._lane.drain()

    def close(self) -> None:
        self._reader.shutdown(cancel_futures=True)
        self._writer.shutdown(cancel_futures=True)
        self._file.close()

    def _read(self, place: Place) -> Tensor:
        n_rows = place[1] - place[0]
        host = torch.empty(n_rows, self.shape[1], dtype=self.dtype, pin_memory=self._pinned)
        view = host.view(torch.uint8).numpy().reshape(-1).data
        self._move(os.preadv, view, place[0] * self._row_bytes, "read")
        return host

    def _write(self, place: Place, host: Tensor, gone: torch.cuda.Event | None) -> None:
        if gone is not None:
            gone.synchronize()
        view = host.contiguous().view(torch.uint8).numpy().reshape(-1).data
        self._move(os.pwritev, view, place[0] * self._row_bytes, "written")

    def _move(self, call: object, view: memoryview, position: int, verb: str) -> None:
        done = 0
        while done < len(view):
            try:
                count = call(self._file.fileno(), [view[done:]], position + done)  # type: ignore[operator]
            except OSError as error:
                raise OutputError(
                    f"{self._folder}: hidden states cannot be {verb} ({error.strerror}); free "
                    "space there, or pass --spool host"
                ) from error
            if count == 0:
                raise OutputError(f"{self._folder}: the file of hidden states was cut while in use")
            done += count


def _reserve(folder: Path, n_bytes: int) -> BinaryIO:
    """A nameless file of this length; OutputError if there is no room."""
    try:
        file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115, closed with the spool
        try:
            reserve(file.fileno(), n_bytes)
        except OSError:
            file.close()
            raise
    except OSError as error:
        raise OutputError(
            f"{folder}: no room for {n_bytes:,} bytes of hidden states ({error.strerror}); free "
            "some, or observe fewer --samples"
        ) from error
    return file


def open_spool(
    kind: str, shape: tuple[int, int], dtype: torch.dtype, device: torch.device, folder: Path
) -> Spool:
    """A spool of (positions, H): `kind` is device, host or disk (in `folder`).

    Raises OutputError if the disk is too full.
    """
    if kind == "device":
        return DeviceSpool(*shape, dtype, device)
    if kind == "host":
        return PinnedSpool(*shape, dtype, device)
    return FileSpool(*shape, dtype, device, folder)
