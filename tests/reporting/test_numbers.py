"""Numbers with as many digits as their errors allow."""

from __future__ import annotations

import pytest

from reap2gguf.bundle.evaluation import Estimate
from reap2gguf.reporting import numbers
from reap2gguf.reporting.numbers import coordinate, difference, estimate, exact, plain, with_error


@pytest.mark.parametrize(
    ("value", "error", "shown"),
    [
        (9.54321, 0.0812, ("9.543", "0.081")),
        (0.0008, 0.000016, ("0.000800", "0.000016")),
        (1234.5, 12.3, ("1,234", "12")),
        (-3.04, 0.4, ("\u22123.04", "0.40")),
        (0.25, 0.0, ("0.2500", "0")),
        (-0.001, 0.5, ("0.00", "0.50")),
        (0.1, 1e-12, ("0.10000000", "0.00000000")),
    ],
)
def test_estimates(value: float, error: float, shown: tuple[str, str]) -> None:
    assert estimate(Estimate(value, error)) == shown


def test_percent() -> None:
    assert with_error(Estimate(0.88, 0.002), 100, " %") == "88.00 ± 0.20 %"


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.0, "0"),
        (0.00012346, "0.0001235"),
        (12345.678, "12,346"),
        (8.4, "8.400"),
        (-2, "\u22122.000"),
    ],
)
def test_numbers_without_an_error(value: float, shown: str) -> None:
    assert plain(value) == shown


def test_differences() -> None:
    assert difference(Estimate(0.45, 0.03), Estimate(0.48, 0.04)) == Estimate(
        pytest.approx(-0.03), pytest.approx(0.05)
    )


def test_numbers_for_programs() -> None:
    assert float(exact(1 / 3)) == 1 / 3
    assert [coordinate(one) for one in (0, 12.5, 33.3333, -0.001, 100.0)] == [
        "0", "12.5", "33.33", "0", "100",
    ]  # fmt: skip


def test_ranges_of_layers() -> None:
    assert numbers.layers([0, 1, 2, 5, 7, 8]) == "0\u20132, 5, 7\u20138"
    assert numbers.layers([]) == ""
