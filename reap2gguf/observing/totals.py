"""A layer's sums of all processes, which come to the host while the next layer computes.

The GPUs add them up and copy them on a stream of their own, so that nothing waits for them at the
end of a layer. Memory: a layer's sums twice on the device and once on the host, for two layers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from reap2gguf.observing.compute.ranks import Ranks


class Totals:
    """Sums, peaks and counts of one layer, on their way."""

    def __init__(
        self,
        ranks: Ranks,
        device: torch.device,
        sums: Iterable[Tensor],
        peaks: Iterable[Tensor],
        counts: Sequence[int],
    ) -> None:
        """Begin to add `sums` and `counts` of all processes, and to find the largest `peaks`."""
        self._ranks = ranks
        added = [*sums, torch.tensor(counts, dtype=torch.int64, device=device)]
        self._sums = _Joined(added)
        self._peaks = _Joined(list(peaks))
        works = [ranks.begin_sum(flat) for flat in self._sums.flats]
        works += [ranks.begin_max(flat) for flat in self._peaks.flats]
        self._works = [work for work in works if work is not None]
        self._copied: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._copy(device)

    def _copy(self, device: torch.device) -> None:
        stream = _copying_stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            self._finish()
            for joined in (self._sums, self._peaks):
                joined.send(stream)
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record(stream)

    def _finish(self) -> None:
        for work in self._works:
            self._ranks.finish(work)
        self._works.clear()

    def collect(self) -> tuple[list[Tensor], list[Tensor], list[int]]:
        """Sums, peaks and counts of all processes, on the host, as they were given."""
        self._finish()
        if self._copied is not None:
            self._copied.synchronize()
        *sums, counts = self._sums.parts()
        return sums, self._peaks.parts(), [int(count) for count in counts]


_STREAMS: dict[torch.device, torch.cuda.Stream] = {}


def _copying_stream(device: torch.device) -> torch.cuda.Stream:
    if device not in _STREAMS:
        _STREAMS[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return _STREAMS[device]


class _Joined:
    """Tensors as one for each type, so that few of them are exchanged and copied."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._shapes = [(tensor.shape, tensor.dtype) for tensor in tensors]
        self._types = sorted({tensor.dtype for tensor in tensors}, key=str)
        self.flats = [
            torch.cat([tensor.reshape(-1) for tensor in tensors if tensor.dtype == dtype])
            for dtype in self._types
        ]

    def send(self, stream: torch.cuda.Stream) -> None:
        """Copy to the host on `stream`, the current one."""
        hosts = []
        for flat in self.flats:
            host = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=True)
            host.copy_(flat, non_blocking=True)
            flat.record_stream(stream)
            hosts.append(host)
        self.flats = hosts

    def parts(self) -> list[Tensor]:
        """The tensors again."""
        left = dict(zip(self._types, self.flats, strict=True))
        found: list[Tensor] = []
        for shape, dtype in self._shapes:
            count = shape.numel()
            found.append(left[dtype][:count].view(shape))
            left[dtype] = left[dtype][count:]
        return found
