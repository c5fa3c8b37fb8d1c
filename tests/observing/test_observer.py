"""A batch counts once it is committed, and not at all if it was settled as bad or discarded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.models.table import describe
from reap2gguf.observing.compute.experts import RoutedPairs
from reap2gguf.observing.saliency import SaliencyObserver


@pytest.fixture
def observer(tiny: Path) -> SaliencyObserver:
    """An observer of a layer of eight experts that has seen nothing."""
    with Checkpoint.open(tiny) as checkpoint:
        model = describe(checkpoint)
    observer = SaliencyObserver(model)
    observer.attach(-1, torch.nn.Module())  # no layer of experts: nothing is hooked
    return observer


PAIRS = RoutedPairs(
    first_expert=2,
    inputs=torch.ones(3, 4),
    activations=torch.ones(3, 2),
    norms=torch.tensor([[1.0, 2.0, 4.0], [0.5, 2.0, 1.0]]),
    gates=torch.tensor([0.5, 0.25, 0.125]),
    ends=torch.tensor([1, 3], dtype=torch.int32),
)


def sums(observer: SaliencyObserver) -> list[list[float]]:
    """Counts, reap sums and largest norms and magnitudes of experts 2 and 3; others have zeros."""
    counts, by_expert = observer.sums()
    (peaks,) = observer.peaks()
    columns = torch.stack((counts.double(), by_expert[:, 0], *peaks.T))
    others = [0, 1, 4, 5, 6, 7]
    assert not columns[:, others].any()
    return columns[:, 2:4].tolist()


NOTHING = [[0.0, 0.0]] * 4
ONCE = [[1.0, 2.0], [0.5, 1.0], [1.0, 4.0], [0.5, 2.0]]


def test_a_good_batch_counts_when_it_is_committed(observer: SaliencyObserver) -> None:
    observer.see(PAIRS)
    observer.settle(torch.tensor(True))
    assert sums(observer) == NOTHING
    observer.commit()
    assert sums(observer) == ONCE
    observer.commit()
    assert sums(observer) == ONCE, "a batch counts once"


def test_a_bad_batch_adds_nothing(observer: SaliencyObserver) -> None:
    observer.see(PAIRS)
    observer.settle(torch.tensor(False))
    observer.commit()
    assert sums(observer) == NOTHING


def test_a_bad_batch_adds_nothing_even_if_its_values_are_not_finite(
    observer: SaliencyObserver,
) -> None:
    bad = replace(PAIRS, norms=torch.full((2, 3), float("nan")))
    observer.see(bad)
    observer.settle(torch.tensor(False))
    observer.commit()
    assert sums(observer) == NOTHING


def test_a_discarded_batch_is_forgotten(observer: SaliencyObserver) -> None:
    observer.see(PAIRS)
    observer.settle(torch.tensor(True))
    observer.discard()
    observer.commit()
    assert sums(observer) == NOTHING
