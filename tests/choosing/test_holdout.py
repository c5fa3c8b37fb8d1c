"""Which rows are held out."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reap2gguf.artifacts.texts import ObservationRows
from reap2gguf.choosing.amounts import MOST_HELD_TOKENS
from reap2gguf.choosing.holdout import held_numbers, hold_out
from reap2gguf.errors import CalibrationError


def rows_of(n_rows: int, length: int = 4) -> ObservationRows:
    rows = [np.full(length, number) for number in range(n_rows)]
    return ObservationRows("a text", "0" * 64, rows)


def test_every_row_is_seen_or_held_out() -> None:
    split = hold_out(rows_of(80))
    assert [int(row[0]) for row in split.held] == [4, 12, 20, 28, 36, 44, 52, 60, 68, 76]
    seen = [int(row[0]) for row in split.seen.rows]
    assert sorted([*seen, *(int(row[0]) for row in split.held)]) == list(range(80))
    assert seen == sorted(seen)
    assert split.seen.label == "a text"


def test_the_rows_that_are_seen_have_a_hash_of_their_own() -> None:
    rows = rows_of(16)
    split = hold_out(rows)
    assert split.seen.sha256 != rows.sha256
    assert split.seen.sha256 == hold_out(rows_of(16)).seen.sha256
    assert split.seen.sha256 != hold_out(rows_of(17)).seen.sha256


def test_a_large_calibration_holds_out_no_more_than_it_needs() -> None:
    numbers = held_numbers([2048] * 1024)
    assert len(numbers) == MOST_HELD_TOKENS // 2048


@given(st.lists(st.integers(2, 4096), min_size=3, max_size=300))
def test_held_rows_are_some_and_spread(lengths: list[int]) -> None:
    numbers = held_numbers(lengths)
    assert numbers == sorted(set(numbers))
    assert 2 <= len(numbers) <= max(2, len(lengths) // 8)
    assert len(numbers) < len(lengths)
    gaps = np.diff([-1, *numbers, len(lengths)])
    assert gaps.max() <= 2 * len(lengths) / len(numbers) + 1


def test_too_few_rows_are_refused() -> None:
    assert len(hold_out(rows_of(3)).held) == 2
    with pytest.raises(CalibrationError, match=r"2 rows, but .* at least 3, of which 2 are held"):
        hold_out(rows_of(2))
