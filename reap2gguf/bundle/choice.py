"""How a build chose among methods of pruning: what was measured of each, and which one was taken.

`choosing` makes these records; manifests hold them, cards show them. They hold no times: the same
inputs make the same record.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from reap2gguf.bundle.estimate import Estimate
from reap2gguf.messages import shown

MOST_CANDIDATES = 64
_LONGEST_NAME = 200  # characters
_MAX_COUNT = 2**63


@dataclass(frozen=True)
class ChoiceText:
    """A text that candidates were measured on, and the perplexity of the source on it."""

    label: str
    sha256: str  # of its tokens
    n_rows: int
    n_tokens: int
    n_scored: int  # tokens in the second halves of the rows
    perplexity: Estimate


@dataclass(frozen=True)
class Figures:
    """What a candidate costs on one text.

    Errors of `perplexity` and `divergence` take tokens as independent, as everywhere. That of
    `behind` takes whole rows, since tokens of a row resemble each other.
    """

    perplexity: Estimate
    divergence: Estimate  # mean KL divergence from the source, nats per token
    behind: Estimate  # how much larger it is than the lowest of all candidates, row by row


@dataclass(frozen=True)
class CandidateRecord:
    """A way to choose experts, and what it costs."""

    name: str
    held_out: Figures
    other: Figures | None  # None: no text of another domain was measured
    same_as: str | None = None  # an earlier candidate that keeps the same experts


@dataclass(frozen=True)
class ChoiceRecord:
    """All candidates, the texts, and the candidate that was taken."""

    chosen: str
    held_out: ChoiceText  # rows of the calibration that the observation did not read
    other: ChoiceText | None
    candidates: Sequence[CandidateRecord]

    def candidate(self, name: str) -> CandidateRecord:
        """The record of a candidate. Raises KeyError for a name that is none."""
        for one in self.candidates:
            if one.name == name:
                return one
        raise KeyError(name)


def choice_of(values: Mapping[str, Any]) -> ChoiceRecord:
    """A record from plain JSON; `bundle.bounds` knows how large its figures may be.

    Raises KeyError, TypeError or ValueError for what is none.
    """
    candidates = values["candidates"]
    if not isinstance(candidates, list) or not 1 <= len(candidates) <= MOST_CANDIDATES:
        raise TypeError(f"candidates is {shown(candidates)}, expected 1 to {MOST_CANDIDATES}")
    other = values["other"]
    found = ChoiceRecord(
        _text(values["chosen"]),
        _choice_text(values["held_out"]),
        None if other is None else _choice_text(other),
        tuple(map(_candidate, candidates)),
    )
    names = [one.name for one in found.candidates]
    if len(set(names)) < len(names):
        raise ValueError("candidates names one twice")
    for one in found.candidates:
        if one.same_as is not None and one.same_as not in names[: names.index(one.name)]:
            raise ValueError(f"same_as is {shown(one.same_as)}, expected an earlier candidate")
        if (one.other is None) != (found.other is None):
            raise ValueError(f"{shown(one.name)} is not measured on the texts of the others")
    if found.chosen not in names:
        raise ValueError(f"chosen is {shown(found.chosen)}, which is not among the candidates")
    return found


def _choice_text(values: Mapping[str, Any]) -> ChoiceText:
    return ChoiceText(
        _text(values["label"]),
        _text(values["sha256"]),
        _count("n_rows", values["n_rows"]),
        _count("n_tokens", values["n_tokens"]),
        _count("n_scored", values["n_scored"]),
        _estimate("perplexity", values["perplexity"]),
    )


def _candidate(values: Mapping[str, Any]) -> CandidateRecord:
    other, same = values["other"], values["same_as"]
    return CandidateRecord(
        _text(values["name"]),
        _figures(values["held_out"]),
        None if other is None else _figures(other),
        None if same is None else _text(same),
    )


def _figures(values: Mapping[str, Any]) -> Figures:
    return Figures(
        _estimate("perplexity", values["perplexity"]),
        _estimate("divergence", values["divergence"]),
        _estimate("behind", values["behind"]),
    )


def _estimate(name: str, values: Any) -> Estimate:
    if not isinstance(values, dict) or values.keys() != {"value", "error"}:
        raise TypeError(f"{name} is {shown(values)}, expected a figure with its standard error")
    for value in values.values():
        if type(value) not in (int, float) or not math.isfinite(value):
            raise TypeError(f"{name} is {shown(value)}, expected a number")
    return Estimate(float(values["value"]), float(values["error"]))


def _count(name: str, value: Any) -> int:
    if type(value) is not int or not 1 <= value < _MAX_COUNT:
        raise TypeError(f"{name} is {shown(value)}, expected a count")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str) or len(value) > _LONGEST_NAME:
        raise TypeError(f"{shown(value)} is not a short text")
    return value
