"""How a build divided a size between experts and bits: what each number of experts costs.

`fitting/trading.py` finds the figures; manifests hold them, cards show them. They hold no times:
the same inputs make the same record.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from reap2gguf.fitting.target import SENSITIVITIES, TABLE
from reap2gguf.messages import shown

MOST_COUNTS = 64
_LONGEST = 2000  # characters of a text
_MOST = 2**63


@dataclass(frozen=True)
class CountRecord:
    """A number of experts that stays in each layer, and what it costs in all."""

    n_experts: int
    pruning: float  # KL divergence from the source, nats per token: measured
    pruning_error: float  # standard error
    quantizing: float | None = None  # the same for quantizing: predicted; None: it does not fit
    bits_per_weight: float | None = None
    n_bytes: int | None = None  # of the file
    problem: str = ""  # why it does not fit

    @property
    def damage(self) -> float:
        """Both together; infinite if no types make it small enough."""
        return math.inf if self.quantizing is None else self.pruning + self.quantizing


@dataclass(frozen=True)
class BudgetRecord:
    """All numbers of experts that were weighed, for what, and on which text."""

    target: str  # what was asked for, in words
    method: str  # that ranked the experts
    text: str
    text_sha256: str  # of its tokens
    n_scored: int  # tokens
    counts: Sequence[CountRecord]  # the most experts first
    sensitivity: str = TABLE  # how much an error in each tensor counts: by a table, or measured

    @property
    def best(self) -> CountRecord:
        """The number with the least damage; of equal ones, the most experts."""
        return best_of(self.counts)


def best_of(counts: Sequence[CountRecord]) -> CountRecord:
    """The number with the least damage; of equal ones, the most experts."""
    return min(counts, key=lambda one: (one.damage, -one.n_experts))


def budget_of_json(values: Mapping[str, Any]) -> BudgetRecord:
    """A record from plain JSON. Raises KeyError, TypeError or ValueError for what is none."""
    counts = values["counts"]
    if not isinstance(counts, list) or not 1 <= len(counts) <= MOST_COUNTS:
        raise TypeError(f"counts is {shown(counts)}, expected 1 to {MOST_COUNTS}")
    found = BudgetRecord(
        _text("target", values["target"]),
        _text("method", values["method"]),
        _text("text", values["text"]),
        _text("text_sha256", values["text_sha256"]),
        _whole("n_scored", values["n_scored"]),
        tuple(map(_count, counts)),
        _sensitivity(values.get("sensitivity", TABLE)),
    )
    numbers = [one.n_experts for one in found.counts]
    if numbers != sorted(set(numbers), reverse=True):
        raise ValueError(f"counts are of {shown(numbers)} experts, expected descending numbers")
    if not math.isfinite(found.best.damage):
        raise ValueError("counts names none that fits")
    return found


def _count(values: Mapping[str, Any]) -> CountRecord:
    quantizing, bits, n_bytes = (
        values[name] for name in ("quantizing", "bits_per_weight", "n_bytes")
    )
    if len({value is None for value in (quantizing, bits, n_bytes)}) > 1:
        raise TypeError("a count has only some of quantizing, bits_per_weight and n_bytes")
    return CountRecord(
        _whole("n_experts", values["n_experts"]),
        _number("pruning", values["pruning"]),
        _number("pruning_error", values["pruning_error"]),
        None if quantizing is None else _number("quantizing", quantizing),
        None if bits is None else _number("bits_per_weight", bits),
        None if n_bytes is None else _whole("n_bytes", n_bytes),
        _text("problem", values["problem"]),
    )


def _sensitivity(value: Any) -> str:
    if value not in SENSITIVITIES:
        raise ValueError(f"sensitivity is {shown(value)}, expected {' or '.join(SENSITIVITIES)}")
    return str(value)


def _whole(name: str, value: Any) -> int:
    if type(value) is not int or not 1 <= value < _MOST:
        raise TypeError(f"{name} is {shown(value)}, expected a count")
    return value


def _number(name: str, value: Any) -> float:
    # a divergence of floats may be a hair below 0
    if type(value) not in (int, float) or not -1 < value < _MOST:
        raise TypeError(f"{name} is {shown(value)}, expected a number")
    return float(value)


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str) or len(value) > _LONGEST:
        raise TypeError(f"{name} is {shown(value)}, expected a short text")
    return value
