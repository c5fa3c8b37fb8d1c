"""The rule, by cases made by hand."""

from __future__ import annotations

import pytest

from reap2gguf.choosing.rule import best, is_as_good
from tests.choosing.records import candidate


def test_the_lowest_on_the_held_out_rows_is_taken() -> None:
    found = best([candidate("a", 0.3, None), candidate("b", 0.2, None), candidate("c", 0.4, None)])
    assert found.name == "b"


def test_not_if_it_is_significantly_worse_on_the_other_text() -> None:
    good_here = candidate("fitted", 0.1, (0.031, 0.01))
    assert best([good_here, candidate("fair", 0.2, (0.0, 0.0))]).name == "fair"
    within = candidate("fitted", 0.1, (0.019, 0.01))
    assert best([within, candidate("fair", 0.2, (0.0, 0.0))]).name == "fitted"


def test_of_equal_ones_the_first_is_taken() -> None:
    same = [candidate(name, 0.2, (0.0, 0.0)) for name in ("first", "second")]
    assert best(same).name == "first"


@pytest.mark.parametrize(
    ("behind", "expected"), [((0.0, 0.0), True), ((0.02, 0.01), True), ((0.021, 0.01), False)]
)
def test_two_standard_errors_are_significant(behind: tuple[float, float], expected: bool) -> None:
    assert is_as_good(candidate("one", 1.0, behind).other) is expected


def test_without_another_text_nothing_is_worse() -> None:
    assert is_as_good(None)
