"""Sums of a layer, joined and taken apart again."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from reap2gguf.observing.compute.ranks import Ranks
from reap2gguf.observing.totals import Totals
from tests.observing.devices import DEVICES


class Doubled(Ranks):
    """Two processes, the other of which has the same sums and twice the peaks."""

    def begin_sum(self, tensor: Tensor) -> None:
        tensor *= 2

    def begin_max(self, tensor: Tensor) -> None:
        tensor *= 2


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("ranks", [Ranks(0, 0, 1), Doubled(0, 0, 2)])
def test_all_come_back_as_they_were_given(device: str, ranks: Ranks) -> None:
    sums = [torch.arange(6.0).double().view(2, 3), torch.arange(4), torch.ones(1, 2).double()]
    peaks = [torch.tensor([3.0, 4.0]).double()]
    on_device = [[tensor.clone().to(device) for tensor in tensors] for tensors in (sums, peaks)]
    totals = Totals(ranks, torch.device(device), *on_device, (5, 7))
    for tensors in on_device:
        for tensor in tensors:
            tensor.zero_()  # the next layer's sums, say
    found_sums, found_peaks, counts = totals.collect()
    for found, tensor in zip([*found_sums, *found_peaks], [*sums, *peaks], strict=True):
        assert found.device.type == "cpu"
        assert found.dtype == tensor.dtype
        assert torch.equal(found, tensor * ranks.size)
    assert counts == [5 * ranks.size, 7 * ranks.size]


def test_an_observer_may_have_no_sums() -> None:
    assert Totals(Ranks(), torch.device("cpu"), (), (), (1, 0)).collect() == ([], [], [1, 0])
