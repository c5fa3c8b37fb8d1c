"""What is scored, and what is found at every scored token.

Letters: S scored tokens of all rows together, in the order of the rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from reap2gguf.evaluating.figures import Doubles, TokenPair

if TYPE_CHECKING:
    from reap2gguf.artifacts.texts import Row

Tokens = npt.NDArray[np.int64]
Pair = tuple[str, str]  # the names of a reference and of another variant


@dataclass(frozen=True)
class ScoredRow:
    """Tokens (T,) of which those from `first` on are scored, each by what all before it predict."""

    tokens: Row
    first: int  # at least 1: nothing predicts the first token

    @property
    def n_scored(self) -> int:
        return len(self.tokens) - self.first


@dataclass(frozen=True)
class VariantScores:
    """What one variant gives the scored tokens: arrays (S,)."""

    nll: Doubles  # negative log-likelihood of the token that is there, in nats
    top: Tokens  # the likeliest token; of several, the lowest number


@dataclass(frozen=True)
class Scores:
    """What all variants give the scored tokens, and how far apart pairs of them are."""

    rows: Sequence[ScoredRow]
    variants: Mapping[str, VariantScores]  # by name
    divergences: Mapping[Pair, Doubles] = field(default_factory=dict)  # (S,), in nats

    def spans(self) -> list[slice]:
        """Where the scored tokens of each row are in the arrays."""
        ends = np.cumsum([row.n_scored for row in self.rows])
        return [
            slice(int(end) - row.n_scored, int(end))
            for row, end in zip(self.rows, ends, strict=True)
        ]

    def pair(self, reference: str, other: str) -> TokenPair:
        """Two variants token by token. Raises KeyError if they were not compared."""
        first, second = self.variants[reference], self.variants[other]
        divergence = self.divergences[reference, other]
        return TokenPair(divergence, first.top == second.top, first.nll, second.nll)
