"""The last step: what the heads of all variants predict at each scored token, and how it differs.

The vocabulary is read in blocks. For each block the hidden states of all variants pass by, a few
tokens at a time, so that logits are never more than tokens x block (`head_sums.py`). Variants that
share a head, as a model and its pruned form do, share its blocks.

Memory: `Cut` divides what there is among two blocks per head and the logits of the tokens.

Letters: V vocabulary, H hidden, n tokens that are computed together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from reap2gguf.evaluating.head_sums import HeadSums
from reap2gguf.observing.targets import rows_of
from reap2gguf.pruning.view import PrunedView

if TYPE_CHECKING:
    from reap2gguf.checkpoint.weights import Weights
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


def scored_batches(
    batches: Sequence[Batch], groups: Sequence[Sequence[ScoredRow]]
) -> list[ScoredBatch]:
    """The scored tokens of each batch, whose rows are those of a group, one after another."""
    found: list[ScoredBatch] = []
    first = 0
    for batch, rows in zip(batches, groups, strict=True):
        width = batch.tokens.shape[1]
        positions = [
            torch.arange(row.first - 1, len(row.tokens) - 1) + number * width
            for number, row in enumerate(rows)
        ]
        right = [torch.from_numpy(row.tokens[row.first :]) for row in rows]
        found.append(ScoredBatch(batch.span, torch.cat(positions), torch.cat(right), first))
        first += len(found[-1].right)
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
        self._heads: dict[str, VariantRun] = {}  # by variant, the run that reads its head
        by_origin: dict[tuple[int, str], VariantRun] = {}
        for name, run in runs.items():
            origin = _origin(run.decoder.weights, run.decoder.model.head_name)
            self._heads[name] = by_origin.setdefault(origin, run)
        facts = self._decoder.model.facts
        self._vocabulary = facts.vocab_size
        n_threads = self._decoder.crew.n_threads if self._decoder.crew else 1
        self.cut = Cut.into(
            usable,
            facts.vocab_size,
            facts.hidden_size * self._decoder.dtype.itemsize,
            len(by_origin),
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
        self._ask(0)
        with progress.task("Predictions", n_scored * self._vocabulary, "logits") as task:
            for first in range(0, self._vocabulary, self.cut.block):
                blocks = self._take(first)
                self._ask(first + self.cut.block)
                for count in self._each(scored, sums, first, blocks):
                    task.advance(count * len(next(iter(blocks.values()))))
        return sums

    def _ask(self, first: int) -> None:
        """Begin to read the heads' rows from token `first` on, if there are any."""
        last = min(first + self.cut.block, self._vocabulary)
        if first >= last:
            return
        for run in set(self._heads.values()):
            decoder = run.decoder
            name = decoder.model.head_name
            target = rows_of(decoder.weights, name, first, last, decoder.dtype)
            decoder.loader.ask(f"head {first}", {name: target})

    def _take(self, first: int) -> dict[str, Tensor]:
        """The heads' rows (B, H), by variant."""
        taken = {
            run: run.decoder.loader.take(f"head {first}")[run.decoder.model.head_name]
            for run in set(self._heads.values())
        }
        return {name: taken[run] for name, run in self._heads.items()}

    def _each(
        self,
        scored: Sequence[ScoredBatch],
        sums: HeadSums,
        first: int,
        blocks: Mapping[str, Tensor],
    ) -> Iterator[int]:
        """Count a block of the vocabulary for all tokens, a few at a time; how many these were."""

        def count(part: _Part) -> int:
            logits = {
                name: product(self._runs[name].decoder.final_norm(hidden), blocks[name])
                for name, hidden in part.hidden.items()
            }
            sums.add(part.place, first, logits, part.right)
            return len(part.right)

        crew = self._decoder.crew
        return (
            map(count, self._parts(scored))
            if crew is None
            else crew.in_order(count, self._parts(scored))
        )

    def _parts(self, scored: Sequence[ScoredBatch]) -> Iterator[_Part]:
        """The hidden states of all variants at the scored tokens, a few tokens at a time."""
        for batch, following in zip(scored, [*scored[1:], None], strict=True):
            after = None if following is None else following.span
            positions, right = batch.positions.to(self.device), batch.right.to(self.device)
            hidden = {
                name: run.spool.load(batch.span, after)[positions]
                for name, run in self._runs.items()
            }
            for begin in range(0, len(right), self.cut.tokens):
                part = slice(begin, begin + self.cut.tokens)
                place = slice(batch.first + begin, batch.first + begin + len(right[part]))
                yield _Part(place, right[part], {name: h[part] for name, h in hidden.items()})


@dataclass(frozen=True)
class _Part:
    """Some scored tokens: their places in the arrays, and what every variant has of them."""

    place: slice
    right: Tensor  # (n,) int64
    hidden: Mapping[str, Tensor]  # (n, H), after the last layer


def product(hidden: Tensor, block: Tensor) -> Tensor:
    """Logits (n, B) in float32 of hidden states (n, H) and rows of a head (B, H).

    Sums are in float32 also where both are bfloat16: rounded logits would differ by chance.
    """
    if hidden.is_cuda and hidden.dtype is not torch.float32:
        return torch.mm(hidden, block.t(), out_dtype=torch.float32)
    return hidden.float() @ block.float().t()


def _origin(weights: Weights, name: str) -> tuple[int, str]:
    """Whose tensor it is, and its name there: a pruned view has the tensors of its source."""
    while isinstance(weights, PrunedView):
        name, _ = weights.origin(name)
        weights = weights.source
    return id(weights), name
