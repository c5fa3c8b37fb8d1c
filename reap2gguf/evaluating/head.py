"""The last step: what the heads of all variants predict at each scored token, and how it differs.

The vocabulary is read in blocks. For each block the hidden states of all variants pass by, a few
tokens at a time, so that logits are never more than tokens x block (`head_sums.py`). Variants that
share a head, as a model and its pruned form do, share its blocks.

Memory: `Cut` (`head_cut.py`) divides what there is among two blocks per head and the logits of the
tokens.

Letters: V vocabulary, H hidden, n tokens that are computed together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from reap2gguf.evaluating.head_cut import SPAN, Cut, HeadShape
from reap2gguf.evaluating.head_sums import HeadSums
from reap2gguf.evaluating.head_weights import HeadWeights

if TYPE_CHECKING:
    from reap2gguf.evaluating.run import VariantRun
    from reap2gguf.evaluating.scores import Pair, ScoredRow
    from reap2gguf.observing.batches import Batch
    from reap2gguf.observing.spool import Span
    from reap2gguf.progress import Progress


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
            HeadShape(
                self._weights.vocabulary,
                self._decoder.model.facts.hidden_size * self._decoder.dtype.itemsize,
                self._weights.n_heads,
                len(runs),
                n_threads,
            ),
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
                name: logits_of(run, run.decoder.final_norm(part.hidden[name]), blocks[name])
                for name, run in self._runs.items()
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
    """The hidden states of all variants at the scored tokens, at most `most` tokens at a time.

    A batch is long, and few of its tokens may be scored: of the spool, `SPAN` x `most` positions
    are loaded at a time.
    """
    device = next(iter(runs.values())).decoder.device
    places = [(batch, begin) for batch in scored for begin in range(0, len(batch.right), most)]
    pieces = [_pieces(batch, slice(begin, begin + most)) for batch, begin in places]
    following = iter([*(span for part in pieces for span, _ in part), None])
    next(following, None)
    for (batch, begin), part in zip(places, pieces, strict=True):
        found: dict[str, list[Tensor]] = {name: [] for name in runs}
        for span, chosen in part:
            after, own = next(following), chosen.to(device)
            for name, run in runs.items():
                found[name].append(run.spool.load(span, after)[own])
        right = batch.right[begin : begin + most]
        place = slice(batch.first + begin, batch.first + begin + len(right))
        states = {name: torch.cat(parts) for name, parts in found.items()}
        yield Part(place, right.to(device), states, batch.is_compared)


def _pieces(batch: ScoredBatch, own: slice) -> list[tuple[Span, Tensor]]:
    """Where in the spool some scored tokens of a batch are: spans, and places in each of them."""
    left, most = batch.positions[own], SPAN * len(batch.positions[own])
    found: list[tuple[Span, Tensor]] = []
    while len(left):
        count = int(torch.searchsorted(left, left[0] + most))  # they ascend
        chosen, left = left[:count], left[count:]
        low = int(chosen[0])
        span = batch.span[0] + low, batch.span[0] + int(chosen[-1]) + 1
        found.append((span, chosen - low))
    return found


def logits_of(run: VariantRun, normed: Tensor, block: Tensor) -> Tensor:
    """A variant's logits (n, B) in float32 of normed hidden states (n, H) and rows of its head."""
    found, model = product(normed, block), run.decoder.model
    if model.logits_divisor != 1:
        found.div_(model.logits_divisor)
    if model.logit_cap is not None:
        found.div_(model.logit_cap).tanh_().mul_(model.logit_cap)
    return found


def product(hidden: Tensor, block: Tensor) -> Tensor:
    """The product (n, B) in float32 of hidden states (n, H) and rows of a head (B, H).

    Sums are in float32 also where both are bfloat16: rounded logits would differ by chance.
    """
    if hidden.is_cuda and hidden.dtype is not torch.float32:
        return torch.mm(hidden, block.t(), out_dtype=torch.float32)
    return hidden.float() @ block.float().t()
