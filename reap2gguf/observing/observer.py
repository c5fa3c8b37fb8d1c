"""What every observer of a sweep is: sums of one layer at a time, on the device.

A batch's sums are kept aside until it is settled with a flag that lies on the device: where rows
turn out not to be finite the batch adds nothing, and runs again without them. The host need not
wait for the flag. What may run out of memory comes before a batch is committed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from reap2gguf.models.contract import MoeModel
from reap2gguf.observing.compute.crew import current_piece
from reap2gguf.observing.compute.experts import RealTokens, RoutedPairs

Arrays = Mapping[str, npt.NDArray[np.generic]]


class LayerObserver(ABC):
    """Watches one layer at a time."""

    wants_norms = False

    def __init__(self, model: MoeModel) -> None:
        self._model = model
        self._device = torch.device("cpu")
        self.real_tokens: RealTokens | None = None
        # where in the batch it comes from, a sum, and what is added to it
        self._pending: list[tuple[int, Tensor, Tensor]] = []

    def use(self, device: torch.device) -> None:
        """Sum on `device` from now on."""
        self._device = device

    @abstractmethod
    def last_layer(self) -> int:
        """The last layer of interest."""

    @abstractmethod
    def attach(self, index: int, layer: torch.nn.Module) -> None:
        """Begin a layer."""

    @abstractmethod
    def see(self, pairs: RoutedPairs) -> None:
        """Some experts' routed pairs of one batch."""

    @abstractmethod
    def finish(self, index: int) -> None:
        """End a layer and keep its sums."""

    @abstractmethod
    def sums(self) -> Iterable[Tensor]:
        """The layer's sums so far; those of several processes add."""

    @abstractmethod
    def kept(self) -> Arrays:
        """The sums of all finished layers, by names of its own."""

    @abstractmethod
    def restore(self, arrays: Arrays) -> None:
        """Take up what `kept` gave; KeyError or ValueError if it is not that."""

    def peaks(self) -> Iterable[Tensor]:
        """The layer's maxima so far."""
        return ()

    def _add(self, total: Tensor, added: Tensor) -> None:
        """Let what was found in a batch, or in a piece of it, count once it is settled."""
        piece = current_piece()
        self._pending.append((0 if piece is None else piece.begin, total, added))

    def settle(self, good: Tensor) -> None:
        """End a batch: its sums will count where `good`, a bool on the device, is true."""
        # pieces of a batch come in any order, and the order of additions shows
        self._pending.sort(key=lambda pending: pending[0])
        self._pending = [
            (place, total, torch.where(good, added, 0)) for place, total, added in self._pending
        ]

    def commit(self) -> None:
        """Count a batch that was settled; takes no memory, so it cannot fail for want of any."""
        for _, total, added in self._pending:
            total += added
        self._pending.clear()

    def discard(self) -> None:
        """Forget a batch that was not finished."""
        self._pending.clear()
