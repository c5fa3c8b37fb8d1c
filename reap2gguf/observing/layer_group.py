"""Neighbouring layers that a batch goes through before its hidden states wait again.

Usually that is one layer. Where hidden states wait on a disk, it is as many as the memory of the
GPU holds: with four of them the disk writes and reads a fourth of the bytes. Each layer has an
observer of its own, and the sums are those of layers that run one by one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from reap2gguf.observing.compute.kernels import finite_rows

if TYPE_CHECKING:
    from reap2gguf.observing.batches import Batch
    from reap2gguf.observing.decoder import StreamedDecoder
    from reap2gguf.observing.observer import LayerObserver


def groups_of_layers(first: int, end: int, depth: int, mtp_layer: int | None) -> Iterator[range]:
    """Layers `first` to `end` in runs of up to `depth`; an MTP block is alone.

    >>> list(groups_of_layers(1, 6, 3, mtp_layer=5))
    [range(1, 4), range(4, 5), range(5, 6)]
    """
    while first < end:
        stop = min(first + depth, end)
        if mtp_layer is not None and first < mtp_layer < stop:
            stop = mtp_layer
        yield range(first, stop)
        first = stop


class LayerGroup:
    """Layers with their weights, and who watches each."""

    def __init__(self, decoder: StreamedDecoder, layers: range, observer: LayerObserver) -> None:
        self.layers = layers
        self._decoder = decoder
        self._is_mtp = layers[0] == decoder.mtp_layer
        self.observers = [observer.unused() for _ in layers]

    def attach(self, index: int, layer: torch.nn.Module) -> None:
        """Have a layer watched, with sums of zero."""
        self.observers[index - self.layers[0]].attach(index, layer)

    def run(self, batch: Batch, hidden: Tensor, n_counted: int) -> tuple[Tensor, Tensor]:
        """The hidden states of a batch after the last layer, and what was finite after each.

        The latter is (layers, B) bool. A layer counts the batch, once it is committed, if all of
        its rows are finite so far; the first `n_counted` layers have counted it already.
        """
        device = self._decoder.device
        output = hidden.view(*batch.tokens.shape, hidden.shape[-1])
        real = batch.real(device, n_ahead=1 if self._is_mtp else 0)
        good, found = torch.ones((), dtype=torch.bool, device=device), []
        for number, (index, observer) in enumerate(zip(self.layers, self.observers, strict=True)):
            observer.real_tokens = real
            if self._is_mtp:
                output = self._decoder.run_mtp(output, batch.tokens)
            else:
                output = self._decoder.run_layer(index, output)
            finite = finite_rows(output)  # (B, T)
            if real is not None:
                finite |= ~real.mask.view_as(finite)
            found.append(finite.all(-1))
            good = good & found[-1].all()
            if number < n_counted:
                observer.discard()
            else:
                observer.settle(good & batch.observed)
        return output, torch.stack(found)

    def commit(self) -> None:
        """Count the batch that was run."""
        for observer in self.observers:
            observer.commit()

    def discard(self) -> None:
        """Forget a batch that did not finish."""
        for observer in self.observers:
            observer.discard()

    def detach(self) -> None:
        """End the layers."""
        for observer in self.observers:
            observer.detach()
