"""Rows in batches: none is lost, padding is not real, and halves are the whole."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from reap2gguf.observing.batches import assign_spans, dealt, group, padded_batches

CPU = torch.device("cpu")
LENGTHS = st.lists(st.integers(1, 40), max_size=30)


def rows_of(lengths: list[int]) -> list[np.ndarray]:
    """Rows of different tokens, none of which is 0, the padding."""
    return [np.arange(length) + 100 * (index + 1) for index, length in enumerate(lengths)]


@given(LENGTHS, st.integers(1, 200))
def test_every_row_is_in_one_batch(lengths: list[int], max_tokens: int) -> None:
    rows = rows_of(lengths)
    batches = padded_batches(group(rows, max_tokens), observed=True)
    found = [
        tokens[:length].tolist()
        for batch in batches
        for tokens, length in zip(batch.tokens, batch.lengths.tolist(), strict=True)
    ]
    assert sorted(found) == sorted(row.tolist() for row in rows)
    assert all(b.tokens.numel() <= max_tokens or len(b.tokens) == 1 for b in batches)
    n_positions = assign_spans(batches)
    assert n_positions == sum(batch.tokens.numel() for batch in batches)
    assert all(a.span[1] == b.span[0] for a, b in pairwise(batches))


@given(LENGTHS, st.integers(0, 2))
def test_real_positions_are_those_of_tokens(lengths: list[int], n_ahead: int) -> None:
    for batch in padded_batches(group(rows_of(lengths), 100), observed=True):
        expected = (batch.tokens != 0).reshape(-1)
        if n_ahead:
            shifted = torch.nn.functional.pad(batch.tokens, (0, n_ahead))[:, n_ahead:]
            expected = (shifted != 0).reshape(-1)
        real = batch.real(CPU, n_ahead)
        if real is None:
            assert bool(expected.all())
            continue
        assert torch.equal(real.mask, expected)
        assert real.positions.tolist() == expected.nonzero().squeeze(1).tolist()
        assert real.count == int(expected.sum())


def test_halves_have_the_rows_and_the_positions_of_the_whole() -> None:
    (batch,) = padded_batches(group(rows_of([7, 6, 5, 4, 3]), 100), observed=False)
    batch.start = 11
    first, second = batch.halves()
    assert torch.equal(torch.cat((first.tokens, second.tokens)), batch.tokens)
    assert torch.equal(torch.cat((first.lengths, second.lengths)), batch.lengths)
    assert (first.span[0], first.span[1], second.span[1]) == (11, second.span[0], batch.span[1])
    assert not first.observed
    assert not second.observed


def test_rows_that_are_dropped_are_no_longer_real() -> None:
    (batch,) = padded_batches(group(rows_of([4, 2]), 100), observed=True)
    assert batch.real(CPU) is not None
    batch.keep(torch.tensor([True, False]))
    assert batch.n_tokens == 4
    assert batch.real(CPU) is None, "the row that is left has no padding"


@given(
    lengths=st.lists(st.integers(1, 60), max_size=60),
    max_tokens=st.integers(60, 300),
    n_shares=st.integers(1, 5),
)
def test_rows_are_dealt_evenly(lengths: list[int], max_tokens: int, n_shares: int) -> None:
    """Every row once, batches as large as allowed, and shares that differ by little."""
    rows = rows_of(lengths)
    shares = dealt(rows, max_tokens, n_shares)
    assert len(shares) == n_shares
    found = [row for share in shares for chosen in share for row in chosen]
    assert sorted(map(id, found)) == sorted(map(id, rows))
    sizes = [sum(len(chosen) * len(chosen[0]) for chosen in share) for share in shares]
    for share in shares:
        for chosen in share:
            assert len(chosen) * max(map(len, chosen)) <= max_tokens
    # by the longest row, and by the padding of the last groups
    padding = sum(len(c) * len(c[0]) - sum(map(len, c)) for share in shares for c in share)
    assert max(sizes) - min(sizes) <= max(lengths, default=0) + padding
    if n_shares == 1:
        assert shares[0] == group(rows, max_tokens)


def test_equal_rows_are_dealt_to_the_last_one() -> None:
    shares = dealt(rows_of([8] * 39), 32, 4)
    assert sorted(sum(map(len, share)) for share in shares) == [9, 10, 10, 10]
