"""Where the time of a sweep goes: a stopwatch on the calls that a sweep is made of.

On a GPU the marks are events of the computing stream, so that nothing waits for them; the shares
are of the time between the first mark and the last.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch

from reap2gguf.observing.decoder import StreamedDecoder
from reap2gguf.observing.observer import LayerObserver
from reap2gguf.observing.spool import DeviceSpool, FileSpool, PinnedSpool

ATTENTION = ("self_attn", "linear_attn")


class Stopwatch:
    """Adds up the time between marks, by the name of a part."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks: dict[str, list[tuple[Any, Any]]] = defaultdict(list)
        self._undo: list[Callable[[], None]] = []

    def mark(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def around(self, owner: Any, method: str, part: str) -> None:
        """Time every call of a method."""
        inner = getattr(owner, method)

        def timed(*arguments: Any, **named: Any) -> Any:
            begun = self.mark()
            result = inner(*arguments, **named)
            self._marks[part].append((begun, self.mark()))
            return result

        setattr(owner, method, timed)
        self._undo.append(lambda: setattr(owner, method, inner))

    def watch(self, observer: LayerObserver) -> None:
        """Put marks into the program; `stop` takes them out again."""
        for spool in (DeviceSpool, PinnedSpool, FileSpool):
            self.around(spool, "load", "spool")
            self.around(spool, "store", "spool")
        for method in ("see", "settle", "commit", "_see_input"):
            if hasattr(observer, method):
                self.around(observer, method, "accumulators")
        self.around(StreamedDecoder, "load_layer", "loading")
        load_layer = StreamedDecoder.load_layer

        def load_and_mark(decoder: StreamedDecoder, index: int) -> torch.nn.Module:
            layer = load_layer(decoder, index)
            for name, module in layer.named_children():
                if name in ATTENTION:
                    self.around(module, "forward", "attention")
                if experts := getattr(module, "experts", None):  # a dense layer has none
                    self.around(experts, "forward", "experts")
            return layer

        StreamedDecoder.load_layer = load_and_mark  # type: ignore[method-assign]

    def stop(self) -> None:
        for undo in reversed(self._undo):
            undo()

    def shares(self, seconds: float) -> dict[str, float]:
        """Each part's share of `seconds`; what experts and attention accumulate is taken out."""
        found = {name: sum(map(self._between, marks)) for name, marks in self._marks.items()}
        found["experts"] = found.get("experts", 0.0) - self._inside("accumulators", "experts")
        found["attention"] = found.get("attention", 0.0) - self._inside("accumulators", "attention")
        found["rest"] = seconds - sum(found.values())
        return {name: round(value / seconds, 3) for name, value in found.items()}

    def _inside(self, inner: str, outer: str) -> float:
        """Time of the `inner` marks that lie within an `outer` pair: they were nested calls."""
        pairs = self._marks[outer]
        total, at = 0.0, 0
        for begun, ended in self._marks[inner]:
            while at < len(pairs) and self._between((pairs[at][1], begun)) > 0:
                at += 1
            if at < len(pairs) and self._between((pairs[at][0], begun)) >= 0:
                total += self._between((begun, ended))
        return total

    def _between(self, pair: tuple[Any, Any]) -> float:
        if self._on_gpu:
            torch.cuda.synchronize()
            return float(pair[0].elapsed_time(pair[1])) / 1000
        return float(pair[1] - pair[0])
