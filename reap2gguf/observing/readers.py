"""The threads that read weights, and for a GPU the pinned memory through which they pass.

Memory: for a GPU two buffers of 16 MiB per thread.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

BUFFER_BYTES = 2**24


class Readers:
    """Threads that read, and for a GPU their pinned buffers and the stream that empties them."""

    def __init__(self, device: torch.device, n_threads: int) -> None:
        self.device = device
        self.pool = ThreadPoolExecutor(n_threads, "weights")
        self.stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._buffers = threading.local()

    def next_buffer(self) -> tuple[Tensor, torch.cuda.Event]:
        """The other of this thread's two buffers, and when what was copied from it is gone."""
        if not hasattr(self._buffers, "pair"):
            self._buffers.pair = [self._new_buffer(), self._new_buffer()]
        self._buffers.pair.reverse()
        found: tuple[Tensor, torch.cuda.Event] = self._buffers.pair[0]
        return found

    @staticmethod
    def _new_buffer() -> tuple[Tensor, torch.cuda.Event]:
        buffer = torch.empty(BUFFER_BYTES, dtype=torch.uint8, pin_memory=True)
        return buffer, torch.cuda.Event()  # type: ignore[no-untyped-call]

    def close(self) -> None:
        """End the threads; what was asked for and not begun is not read."""
        self.pool.shutdown(cancel_futures=True)
