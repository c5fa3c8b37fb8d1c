"""Numbers as the page shows them, with as many digits as their standard errors allow."""

from __future__ import annotations

import math

from reap2gguf.bundle.evaluation import Estimate

_MOST_DECIMALS = 8
_DIGITS = 4  # of a number without an error
MINUS = "\u2212"


def plain(value: float, digits: int = _DIGITS) -> str:
    """A number with some significant digits, without an exponent down to 1e-8.

    >>> plain(0.00012346)
    '0.0001235'
    """
    if not value:
        return "0"
    places = digits - 1 - math.floor(math.log10(abs(value)))
    return _signed(f"{value:,.{min(max(places, 0), _MOST_DECIMALS)}f}")


def decimals(error: float) -> int | None:
    """Digits after the point with which an error has two digits of its own; None for no error."""
    if not error > 0:
        return None
    return min(max(1 - math.floor(math.log10(error)), 0), _MOST_DECIMALS)


def estimate(found: Estimate, scale: float = 1.0) -> tuple[str, str]:
    """A figure and its standard error, both times `scale`, in the same number of digits.

    >>> estimate(Estimate(9.54321, 0.0812))
    ('9.543', '0.081')
    """
    value, error = found.value * scale, found.error * scale
    places = decimals(error)
    if places is None:
        return plain(value), "0"
    return _signed(f"{value:,.{places}f}"), f"{error:,.{places}f}"


def with_error(found: Estimate, scale: float = 1.0, unit: str = "") -> str:
    """A figure with its standard error on one line.

    >>> with_error(Estimate(0.88, 0.002), 100, " %")
    '88.00 ± 0.20 %'
    """
    value, error = estimate(found, scale)
    return f"{value} ± {error}{unit}"


def difference(one: Estimate, other: Estimate) -> Estimate:
    """One figure minus another, whose errors are taken as independent."""
    return Estimate(one.value - other.value, math.hypot(one.error, other.error))


def exact(value: float) -> str:
    """A number for a program: it reads back as the same number."""
    return repr(value)


def coordinate(value: float) -> str:
    """A coordinate, to a hundredth."""
    shown = f"{value:.2f}".rstrip("0").rstrip(".")
    return "0" if shown in ("", "-0") else shown


def _signed(shown: str) -> str:
    return shown.replace("-", MINUS) if shown.strip("-0.,") else shown.removeprefix("-")


def layers(numbers: list[int]) -> str:
    """Ascending numbers as ranges.

    >>> layers([0, 1, 2, 5, 7, 8])
    '0\u20132, 5, 7\u20138'
    """
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{a}" if a == b else f"{a}\u2013{b}" for a, b in runs)
