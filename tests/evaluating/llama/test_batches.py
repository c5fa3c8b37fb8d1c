"""Every scored token is read once, within the limits; likelihoods are those of the definition."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reap2gguf.evaluating.llama.batches import Limits, Part, batches, likelihoods

ROWS = st.lists(
    st.integers(2, 40).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n - 1))),
    min_size=1,
    max_size=12,
)
LIMITS = st.builds(Limits, st.integers(1, 50), st.integers(1, 50), st.integers(1, 5))


@given(ROWS, LIMITS)
def test_all_tokens_are_read_in_order_within_the_limits(
    rows: list[tuple[int, int]], limits: Limits
) -> None:
    read: list[list[int]] = [[] for _ in rows]
    outputs: list[tuple[int, int]] = []
    for parts in batches([n for n, _ in rows], [first for _, first in rows], limits):
        assert len(parts) <= limits.rows
        assert sum(part.stop - part.start for part in parts) <= limits.tokens
        assert sum(part.n_outputs for part in parts) <= limits.outputs
        # a row that continues is alone: its memory is that of the call before
        assert all(part.start == 0 for part in parts) or len(parts) == 1
        for part in parts:
            read[part.row] += range(part.start, part.stop)
            wanted = [at for at in range(part.start, part.stop) if part.first <= at < part.last]
            assert len(wanted) == part.n_outputs
            outputs += [(part.row, at) for at in wanted]
    assert read == [list(range(n)) for n, _ in rows]
    # the token before each scored one predicts it
    assert outputs == [
        (row, at) for row, (n, first) in enumerate(rows) for at in range(first - 1, n - 1)
    ]


def test_whole_rows_share_a_call_while_they_fit() -> None:
    shared = [[part.row for part in parts] for parts in batches([4] * 5, [3] * 5, Limits(8, 99, 9))]
    assert shared == [[0, 1], [2, 3], [4]]
    assert list(batches([9], [5], Limits(8, 3, 1))) == [
        [Part(0, 0, 3, 4, 8)], [Part(0, 3, 6, 4, 8)], [Part(0, 6, 9, 4, 8)],
    ]  # fmt: skip


@pytest.mark.parametrize("vocab", [7, 2**21])
def test_likelihoods_are_those_of_a_softmax(vocab: int) -> None:
    draw = np.random.default_rng(0)
    logits = (draw.standard_normal((5, vocab)) * 8).astype(np.float32)
    targets = draw.integers(0, vocab, 5)
    logits[3, [1, 4]] = 100.0  # two likeliest tokens
    nll, top = likelihoods(logits, targets)
    exact = logits.astype(np.float64)
    expected = np.log(np.exp(exact).sum(axis=1)) - exact[np.arange(5), targets]
    assert np.abs(nll - expected).max() < 1e-5
    assert top.tolist() == logits.argmax(axis=1).tolist()
    assert top[3] == 1


def test_a_value_that_is_not_finite_is_seen_in_its_likelihood() -> None:
    logits = np.zeros((4, 4), dtype=np.float32)
    logits[0, 2], logits[1, 3], logits[2, 1] = np.nan, np.inf, 1
    nll, _ = likelihoods(logits, np.array([0, 0, 0, 0]))
    assert np.isfinite(nll).tolist() == [False, False, True, False]  # the last: all the same
