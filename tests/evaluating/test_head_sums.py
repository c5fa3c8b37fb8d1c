"""Sums over blocks of a vocabulary against the whole softmax in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reap2gguf.evaluating.head_sums import HeadSums

NAMES = ("source", "pruned", "file")
PAIRS = [("source", "pruned"), ("pruned", "file"), ("source", "file")]


def summed(
    logits: dict[str, torch.Tensor], right: torch.Tensor, block: int, chunk: int
) -> HeadSums:
    n_scored, vocabulary = logits["source"].shape
    sums = HeadSums(NAMES, PAIRS, n_scored, torch.device("cpu"))
    for first in range(0, vocabulary, block):
        for begin in range(0, n_scored, chunk):
            span = slice(begin, min(begin + chunk, n_scored))
            part = {name: one[span, first : first + block] for name, one in logits.items()}
            sums.add(span, first, part, right[span])
    return sums


@pytest.mark.slow
@settings(deadline=None)
@given(
    seed=st.integers(0, 2**31),
    block=st.integers(1, 70),
    chunk=st.integers(1, 9),
    scale=st.sampled_from([0.0, 1.0, 30.0]),
    shift=st.sampled_from([0.0, 500.0, -3000.0]),
)
def test_blocks_are_the_whole(
    seed: int, block: int, chunk: int, scale: float, shift: float
) -> None:
    draw = torch.Generator().manual_seed(seed)
    base = torch.randn(7, 64, generator=draw) * scale + shift
    logits = {
        name: base + 0.1 * number * scale * torch.randn(7, 64, generator=draw)
        for number, name in enumerate(NAMES)
    }
    right = torch.randint(0, 64, (7,), generator=draw)
    sums = summed(logits, right, block, chunk)
    log = {name: torch.log_softmax(one.double(), -1) for name, one in logits.items()}
    for name, one in logits.items():
        expected = -log[name].gather(1, right[:, None])[:, 0]
        np.testing.assert_allclose(sums.nll(name), expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(sums.top(name), one.argmax(-1))
    for reference, other in PAIRS:
        p, q = log[reference], log[other]
        expected = (p.exp() * (p - q)).sum(-1)
        found = sums.divergence((reference, other))
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_the_same_logits_have_no_divergence() -> None:
    logits = torch.randn(5, 40, generator=torch.Generator().manual_seed(1)) * 10
    sums = summed(dict.fromkeys(NAMES, logits), torch.zeros(5, dtype=torch.int64), 7, 2)
    assert sums.divergence(("source", "file")).tolist() == [0.0] * 5
