"""What is scored, and what is found at every scored token.

Letters: S scored tokens of all rows together, in the order of the rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
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
    instead: tuple[int, ...] = ()  # tokens in place of the last one, which are scored after it
    is_compared: bool = True  # whether variants are compared at its tokens

    @property
    def n_scored(self) -> int:
        return len(self.tokens) - self.first + len(self.instead)

    @property
    def right(self) -> Tokens:
        """The tokens that are scored, (n_scored,)."""
        return np.concatenate([self.tokens[self.first :], np.array(self.instead, np.int64)])

    @property
    def positions(self) -> Tokens:
        """Where each of them is predicted, (n_scored,)."""
        last = len(self.tokens) - 2
        own = np.arange(self.first - 1, last + 1)
        return np.concatenate([own, np.full(len(self.instead), last)])

    def apart(self) -> list[ScoredRow]:
        """The same scored tokens, in rows that have nothing in place of a token."""
        others = [
            replace(
                self,
                tokens=np.append(self.tokens[:-1], token),
                first=len(self.tokens) - 1,
                instead=(),
            )
            for token in self.instead
        ]
        return [replace(self, instead=()), *others]


def joined(rows: Sequence[ScoredRow]) -> list[ScoredRow]:
    """The same scored tokens in the same order, with fewer rows.

    Rows that follow each other and differ in the last token alone, which alone is scored, such as
    the four answers to a question of MMLU, become one: all of them are predicted at one position.
    """
    found: list[ScoredRow] = []
    for row in rows:
        if found and _is_joined(found[-1], row):
            instead = (*found[-1].instead, int(row.tokens[-1]))
            found[-1] = replace(found[-1], instead=instead)
        else:
            found.append(row)
    return found


def _is_joined(row: ScoredRow, following: ScoredRow) -> bool:
    return (
        row.first == following.first == len(row.tokens) - 1 == len(following.tokens) - 1
        and not following.instead
        and row.is_compared == following.is_compared
        and np.array_equal(row.tokens[:-1], following.tokens[:-1])
    )


@dataclass(frozen=True)
class VariantScores:
    """What one variant gives the scored tokens: arrays (S,)."""

    nll: Doubles  # negative log-likelihood of the token that is there, in nats
    top: Tokens  # the likeliest token; of several, the lowest number


@dataclass(frozen=True)
class Scores:
    """What all variants give the scored tokens, and how far apart pairs of them are.

    Divergences of tokens in rows that are not compared are NaN.
    """

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

    def part(self, first: int, last: int) -> Scores:
        """The scores of rows [first, last) alone."""
        start = sum(row.n_scored for row in self.rows[:first])
        rows = self.rows[first:last]
        own = slice(start, start + sum(row.n_scored for row in rows))
        variants = {
            name: VariantScores(found.nll[own], found.top[own])
            for name, found in self.variants.items()
        }
        apart = {pair: found[own] for pair, found in self.divergences.items()}
        return Scores(rows, variants, apart)

    def pair(self, reference: str, other: str) -> TokenPair:
        """Two variants token by token. Raises KeyError if they were not compared."""
        first, second = self.variants[reference], self.variants[other]
        divergence = self.divergences[reference, other]
        return TokenPair(divergence, first.top == second.top, first.nll, second.nll)
