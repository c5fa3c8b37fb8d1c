"""What the observers of a sweep have in common: sums of one layer at a time, on the device.

What a batch adds to the sums is pending until the batch is settled with a flag. If rows of the
batch are not finite, the flag is false: the batch adds nothing, and runs again without those rows.
The flag is on the device, so that the host does not wait for it. All steps that may run out of
memory come before the batch is committed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from reap2gguf.observing.compute.crew import current_slice

if TYPE_CHECKING:
    from reap2gguf.models.contract import MoeModel
    from reap2gguf.observing.compute.experts import RealTokens, RoutedPairs

Arrays = Mapping[str, npt.NDArray[np.generic]]


class LayerObserver(ABC):
    """Watches one layer at a time."""

    wants_norms = False
    wants_squares = False

    def __init__(self, model: MoeModel) -> None:
        self._model = model
        self._device = torch.device("cpu")
        self.real_tokens: RealTokens | None = None
        # (first position of the slice it comes from, a sum, what will be added to the sum)
        self._pending: list[tuple[int, Tensor, Tensor]] = []

    def use(self, device: torch.device) -> None:
        """Keep the sums of the layers to come on `device`."""
        self._device = device

    def unused(self) -> LayerObserver:
        """Another observer of this class, for the same model and device, that has seen nothing.

        A sweep lets one of them see each layer, and gives the first one what it found.
        """
        other = type(self)(self._model)
        other.use(self._device)
        return other

    @abstractmethod
    def last_layer(self) -> int:
        """The last layer that it wants to see."""

    def start(self, index: int) -> None:  # noqa: B027, nothing to do where nothing is published
        """Begin a sweep with layer `index`: the sums of those before it are restored."""

    @abstractmethod
    def attach(self, index: int, layer: torch.nn.Module) -> None:
        """Start a layer: hook into it, with sums of zero."""

    @abstractmethod
    def see(self, pairs: RoutedPairs) -> None:
        """Take in the routed pairs of some experts in one batch."""

    def detach(self) -> None:  # noqa: B027, nothing to do where nothing is hooked
        """End a layer: take out what `attach` put into it."""

    @abstractmethod
    def finish(self, index: int, sums: Sequence[Tensor], peaks: Sequence[Tensor]) -> None:
        """Keep the sums of a layer that has ended, of all processes, on the host.

        They are in the order of `sums` and `peaks`. Meanwhile the next layer may be attached.
        """

    @abstractmethod
    def sums(self) -> Iterable[Tensor]:
        """The layer's sums so far, float64 or int64; those of several processes are added."""

    @abstractmethod
    def finished_sums(self) -> Arrays:
        """The sums of all finished layers, under names that the observer chooses."""

    @abstractmethod
    def restore(self, arrays: Arrays) -> None:
        """Take over what `finished_sums` returned. Raises KeyError or ValueError if it is not."""

    def held_bytes(self) -> int:
        """Bytes of host memory that the sums take at most, where they are many."""
        return 0

    def peaks(self) -> Iterable[Tensor]:
        """The layer's maxima so far."""
        return ()

    def _add(self, total: Tensor, added: Tensor) -> None:
        """Add to a sum what was found in a batch, or a slice of it, once the batch is committed."""
        part = current_slice()
        self._pending.append((0 if part is None else part.begin, total, added))

    def settle(self, good: Tensor) -> None:
        """End a batch: it will count if `good`, a bool on the device, is true."""
        # slices of a batch come in any order, and the order of additions changes the last bits
        self._pending.sort(key=lambda pending: pending[0])
        self._pending = [
            (begin, total, torch.where(good, added, 0)) for begin, total, added in self._pending
        ]

    def commit(self) -> None:
        """Count a batch that was settled. Allocates nothing, so it cannot run out of memory."""
        for _, total, added in self._pending:
            total += added
        self._pending.clear()

    def discard(self) -> None:
        """Forget a batch that did not finish."""
        self._pending.clear()
