"""The last step: what the heads of all variants predict at each scored token, and how it differs.

The vocabulary is read in blocks. For each block the hidden states of all variants pass by, a few
tokens at a time, so that logits are never more than tokens x block (`head_sums.py`). Variants that
share a head, as a model and its pruned form do, share its blocks.

Memory: `Cut` divides what there is among two blocks per head and the logits of the tokens.

Letters: V vocabulary, H hidden, n tokens that are computed together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from reap2gguf.evaluating.head_sums import HeadSums
from reap2gguf.evaluating.head_weights import HeadWeights

if TYPE_CHECKING:
    from reap2gguf.evaluating.run import VariantRun
    from reap2gguf.evaluating.scores import Pair, ScoredRow
    from reap2gguf.observing.batches import Batch
    from reap2gguf.observing.spool import Span
    from reap2gguf.progress import Progress

_MOST_TOKENS = {"cpu": 256, "cuda": 4096}  # on a CPU, what stays in its caches
_MOST_BLOCK = {"cpu": 8192, "cuda": 2**20}  # tokens of the vocabulary
_LEAST_BLOCK = 256
_LEAST_TOKENS = 16


@dataclass(frozen=True)
class ScoredBatch:
    """The scored tokens of a batch."""

    span: Span  # of the batch in the spool
    positions: Tensor  # (n,) int64, of the batch: those whose hidden states predict the tokens
    right: Tensor  # (n,) int64, the tokens
    first: int  # place of the first one in the arrays
    is_compared: bool  # whether variants are compared at any of them


def scored_batches(
    batches: Sequence[Batch],
    groups: Sequence[Sequence[ScoredRow]],
    is_chosen: Callable[[ScoredRow], bool] = lambda row: True,
) -> list[ScoredBatch]:
    """The scored tokens of each batch, whose rows are those of a group, one after another.

    Rows that are not chosen, and batches without others, are left out.
    """
    found: list[ScoredBatch] = []
    first = 0
    for batch, rows in zip(batches, groups, strict=True):
        width = batch.tokens.shape[1]
        chosen = [(number * width, row) for number, row in enumerate(rows) if is_chosen(row)]
        if not chosen:
            continue
        positions = [torch.from_numpy(row.positions) + start for start, row in chosen]
        right = torch.cat([torch.from_numpy(row.right) for _, row in chosen])
        is_compared = any(row.is_compared for _, row in chosen)
        found.append(ScoredBatch(batch.span, torch.cat(positions), right, first, is_compared))
        first += len(right)
    return found


@dataclass(frozen=True)
class Cut:
    """How many tokens of the vocabulary, and of the text, are computed together."""

    block: int
    tokens: int

    @classmethod
    def into(
        cls, usable: int, vocabulary: int, row_bytes: int, n_heads: int, n_logits: int, kind: str
    ) -> Cut:
        """The largest cut that fits into `usable` bytes; the smallest one if none does.

        `row_bytes`: of the heads for one token of the vocabulary; `n_logits`: arrays of logits that
        are there at the same time; `kind`: cpu or cuda.
        """
        block = min(vocabulary, _MOST_BLOCK[kind])
        tokens = _MOST_TOKENS[kind]

        def taken() -> int:
            blocks = 1 if block == vocabulary else 2
            return block * (blocks * n_heads * row_bytes + 4 * n_logits * tokens)

        while taken() > usable and (block > _LEAST_BLOCK or tokens > _LEAST_TOKENS):
            # logits and weights get smaller by turns
            if tokens > _LEAST_TOKENS and (tokens >= block // 64 or block <= _LEAST_BLOCK):
                tokens //= 2
            else:
                block //= 2
        return cls(block, tokens)


class Head:
    """The heads of some variants that have been through all layers."""

    def __init__(self, runs: Mapping[str, VariantRun], usable: int) -> None:
        """`usable`: bytes of the device."""
        self._runs = runs
        self._decoder = next(iter(runs.values())).decoder
        self.device = self._decoder.device
        self._weights = HeadWeights(runs)
        n_threads = self._decoder.crew.n_threads if self._decoder.crew else 1
        self.cut = Cut.into(
            usable,
            self._weights.vocabulary,
            self._decoder.model.facts.hidden_size * self._decoder.dtype.itemsize,
            self._weights.n_heads,
            (len(runs) + 2) * n_threads,
            self.device.type,
        )

    @torch.inference_mode()
    def sums(
        self, scored: Sequence[ScoredBatch], pairs: Sequence[Pair], progress: Progress
    ) -> HeadSums:
        """What all variants predict at the scored tokens, in the order of the batches."""
        n_scored = sum(len(batch.right) for batch in scored)
        sums = HeadSums(list(self._runs), pairs, n_scored, self.device)
        for run in self._runs.values():
            run.decoder.load_norm()
        with progress.task("Predictions", n_scored * self._weights.vocabulary, "logits") as task:
            for first, blocks in self._weights.blocks(self.cut.block):
                for count in self._each(scored, sums, first, blocks):
                    task.advance(count * len(next(iter(blocks.values()))))
        return sums

    def _each(
        self,
        scored: Sequence[ScoredBatch],
        sums: HeadSums,
        first: int,
        blocks: Mapping[str, Tensor],
    ) -> Iterator[int]:
        """Count a block of the vocabulary for all tokens, a few at a time; how many these were."""

        def count(part: Part) -> int:
            logits = {
                name: product(self._runs[name].decoder.final_norm(hidden), blocks[name])
                for name, hidden in part.hidden.items()
            }
            sums.add(part.place, first, logits, part.right, part.is_compared)
            return len(part.right)

        crew = self._decoder.crew
        parts = parts_of(scored, self._runs, self.cut.tokens)
        return map(count, parts) if crew is None else crew.in_order(count, parts)


@dataclass(frozen=True)
class Part:
    """Some scored tokens: their places in the arrays, and what every variant has of them."""

    place: slice
    right: Tensor  # (n,) int64
    hidden: Mapping[str, Tensor]  # (n, H), after the last layer
    is_compared: bool


def parts_of(
    scored: Sequence[ScoredBatch], runs: Mapping[str, VariantRun], most: int
) -> Iterator[Part]:
    """The hidden states of all variants at the scored tokens, at most `most` tokens at a time."""
    device = next(iter(runs.values())).decoder.device
    for batch, following in zip(scored, [*scored[1:], None], strict=True):
        after = None if following is None else following.span
        positions, right = batch.positions.to(device), batch.right.to(device)
        hidden = {name: run.spool.load(batch.span, after)[positions] for name, run in runs.items()}
        for begin in range(0, len(right), most):
            own = slice(begin, begin + most)
            place = slice(batch.first + begin, batch.first + begin + len(right[own]))
            states = {name: h[own] for name, h in hidden.items()}
            yield Part(place, right[own], states, batch.is_compared)


def product(hidden: Tensor, block: Tensor) -> Tensor:
    """Logits (n, B) in float32 of hidden states (n, H) and rows of a head (B, H).

    Sums are in float32 also where both are bfloat16: rounded logits would differ by chance.
    """
    if hidden.is_cuda and hidden.dtype is not torch.float32:
        return torch.mm(hidden, block.t(), out_dtype=torch.float32)
    return hidden.float() @ block.float().t()
