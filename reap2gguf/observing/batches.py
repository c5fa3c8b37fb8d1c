"""Rows of tokens in batches that are computed together.

Rows of similar length share a batch, up to a number of tokens. Shorter rows are padded on the
right: causal attention does not see the padding, and no sum counts it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Sized
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from reap2gguf.observing.compute.experts import RealTokens

if TYPE_CHECKING:
    from reap2gguf.artifacts.texts import Row
    from reap2gguf.observing.spool import Span

AnyRow = TypeVar("AnyRow", bound=Sized)  # whose length is its number of tokens


@dataclass
class Batch:
    """Rows that are computed together; in the spool their hidden states begin at `start`."""

    tokens: Tensor  # (B, T) int64, on the host
    lengths: Tensor  # (B,) int64, on the host
    start: int
    observed: bool = True
    _real: dict[int, RealTokens | None] = field(default_factory=dict, repr=False)

    @property
    def n_tokens(self) -> int:
        """Tokens without padding."""
        return int(self.lengths.sum())

    @property
    def span(self) -> Span:
        """Its positions in the spool."""
        return self.start, self.start + self.tokens.numel()

    def real(self, device: torch.device, n_ahead: int = 0) -> RealTokens | None:
        """The positions where the token and the one `n_ahead` later are real; None: all of them."""
        if n_ahead not in self._real:
            self._real[n_ahead] = self._find_real(device, n_ahead)
        return self._real[n_ahead]

    def _find_real(self, device: torch.device, n_ahead: int) -> RealTokens | None:
        width = self.tokens.shape[1]
        lengths = self.lengths - n_ahead
        if bool((lengths == width).all()):
            return None
        mask = (torch.arange(width) < lengths[:, None]).reshape(-1)
        return RealTokens(mask.to(device), mask.nonzero().squeeze(1).to(device))

    def keep(self, rows: Tensor) -> None:
        """Keep only the rows that are true in `rows` (B,)."""
        self.lengths = self.lengths[rows]
        self.tokens = self.tokens[rows]
        self._real.clear()

    def halves(self) -> tuple[Batch, Batch]:
        """The same rows as two batches."""
        middle = len(self.tokens) // 2
        first = Batch(self.tokens[:middle], self.lengths[:middle], self.start, self.observed)
        second = Batch(self.tokens[middle:], self.lengths[middle:], first.span[1], self.observed)
        return first, second


def group(rows: Iterable[AnyRow], max_tokens: int) -> list[list[AnyRow]]:
    """Rows from the longest to the shortest, in groups of at most `max_tokens` padded tokens."""
    groups: list[list[AnyRow]] = []
    for row in sorted(rows, key=len, reverse=True):
        # the first row of a group is its longest
        if groups and (len(groups[-1]) + 1) * len(groups[-1][0]) <= max_tokens:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


def dealt(rows: Iterable[AnyRow], max_tokens: int, n_shares: int) -> list[list[list[AnyRow]]]:
    """The groups of each of `n_shares` processes, which get nearly the same number of positions.

    Whole groups are dealt while there are many of them, the rows of the last ones one by one.
    """
    groups = group(rows, max_tokens)
    n_whole = max(0, len(groups) // n_shares - 1) * n_shares
    shares = [groups[number:n_whole:n_shares] for number in range(n_shares)]
    sizes = [sum(len(chosen) * len(chosen[0]) for chosen in share) for share in shares]
    last: list[list[AnyRow]] = [[] for _ in shares]
    for row in (row for chosen in groups[n_whole:] for row in chosen):
        least = sizes.index(min(sizes))
        last[least].append(row)
        sizes[least] += len(row)
    return [share + group(own, max_tokens) for share, own in zip(shares, last, strict=True)]


def padded_batches(groups: Iterable[Sequence[Row]], observed: bool) -> list[Batch]:
    """A batch of each group of rows; none has its positions in a spool yet."""
    batches: list[Batch] = []
    for chosen in groups:
        lengths = torch.tensor([len(row) for row in chosen])
        tokens = torch.zeros(len(chosen), int(lengths.max()), dtype=torch.int64)
        for index, row in enumerate(chosen):
            tokens[index, : len(row)] = torch.from_numpy(row)
        batches.append(Batch(tokens, lengths, 0, observed))
    return batches


def assign_spans(batches: Sequence[Batch]) -> int:
    """Place `batches` one after another in a spool; the number of positions they take."""
    position = 0
    for batch in batches:
        batch.start = position
        position = batch.span[1]
    return position
