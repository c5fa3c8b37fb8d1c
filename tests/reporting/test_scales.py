"""Axes: where values lie, and which numbers stand beside them."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reap2gguf.reporting.scales import Scale, linear_scale, log_scale


def test_places_on_a_line() -> None:
    scale = Scale(10, 20)
    assert [scale.at(value) for value in (5, 10, 15, 20, 99)] == [0, 0, 50, 100, 100]
    assert scale.ticks() == [10, 12, 14, 16, 18, 20]


def test_places_on_a_logarithmic_line() -> None:
    scale = Scale(0.001, 10, is_log=True)
    assert [round(scale.at(value)) for value in (0, 0.001, 0.1, 10)] == [0, 0, 50, 100]
    assert scale.ticks() == pytest.approx([0.001, 0.01, 0.1, 1, 10])


@given(st.lists(st.floats(1e-9, 1e9), min_size=1, max_size=6))
def test_scales_hold_their_values(values: list[float]) -> None:
    for scale in (linear_scale(values), log_scale(values)):
        assert scale.low <= min(values) * (1 + 1e-3)
        assert scale.high >= max(values) * (1 - 1e-3)
        places = [scale.at(value) for value in sorted(values)]
        assert places == sorted(places)
        ticks = scale.ticks()
        assert 1 <= len(ticks) <= 13
        assert all(0 <= scale.at(tick) <= 100 for tick in ticks)


def test_values_without_a_logarithm() -> None:
    scale = log_scale([0.0, 0.0])
    assert scale.at(0.0) == 0
    assert math.isfinite(scale.at(1.0))


def test_from_zero() -> None:
    assert linear_scale([90, 97], from_zero=True) == Scale(0, 100)
    assert linear_scale([5, 5]).at(5) == pytest.approx(50)
    assert linear_scale([0, 0]) == Scale(0, 1)
