"""Axes: from values to percentages of their length, and the round numbers beside them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

_MOST_TICKS = 6


@dataclass(frozen=True)
class Scale:
    """From values to percentages of an axis; values beyond its ends are drawn at the ends."""

    low: float
    high: float
    is_log: bool = False

    def at(self, value: float) -> float:
        if self.is_log:
            value = math.log(max(value, self.low))
            low, high = math.log(self.low), math.log(self.high)
        else:
            low, high = self.low, self.high
        return min(max((value - low) / (high - low), 0.0), 1.0) * 100

    def ticks(self) -> list[float]:
        if not self.is_log:
            step = _nice((self.high - self.low) / _MOST_TICKS)
            first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
            return [number * step for number in range(first, last + 1)]
        first, last = round(math.log10(self.low) - 0.5), math.ceil(math.log10(self.high))
        factors = (1, 2, 5) if last - first <= 2 else (1,)
        found = [f * 10.0**power for power in range(first, last + 1) for f in factors]
        inside = [one for one in found if self.low * 0.999 <= one <= self.high * 1.001]
        return inside[:: -(-len(inside) // (2 * _MOST_TICKS))] if inside else [self.low]


def _nice(step: float) -> float:
    """The next larger of 1, 2 and 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return next((f * power for f in (1, 2, 5) if f * power >= step * 0.999), 10 * power)


def log_scale(values: Sequence[float]) -> Scale:
    """From 1, 2 or 5 times a power of ten below the smallest positive value to one above all."""
    positive = [value for value in values if value > 0] or [1.0]
    low, high = _below_or_at(min(positive)), _nice(max(positive))
    if high < 10 * low:
        low, high = _below_or_at(low * 0.5), _nice(high * 2)
    return Scale(low, high, is_log=True)


def _below_or_at(value: float) -> float:
    power = 10.0 ** math.floor(math.log10(value))
    return max(f * power for f in (1, 2, 5) if f * power <= value * 1.001)


def linear_scale(values: Sequence[float], from_zero: bool = False) -> Scale:
    """Round numbers around all values."""
    low, high = min(values), max(values)
    if from_zero:
        low = min(low, 0.0)
    if not high > low:
        low, high = (low - 0.5, high + 0.5) if low else (0.0, 1.0)
    step = _nice((high - low) / _MOST_TICKS)
    return Scale(math.floor(low / step) * step, math.ceil(high / step) * step)
