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

if TYPE_CHECKING:
    from pathlib import Path

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
_SPAN = (
    4  # positions that are loaded at once, in multiples of the tokens that are computed together
)
_PARTS = 4  # parts whose hidden states are there, beside those that threads compute


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
        cls,
        usable: int,
        vocabulary: int,
        row_bytes: int,
        n_heads: int,
        n_logits: int,
        kind: str,
        token_bytes: int = 0,
    ) -> Cut:
        """The largest cut that fits into `usable` bytes; the smallest one if none does.

        `row_bytes`: of the heads for one token of the vocabulary; `n_logits`: arrays of logits that
        are there at the same time; `kind`: cpu or cuda; `token_bytes`: what a token of the text
        takes beside its logits.
        """
        block = min(vocabulary, _MOST_BLOCK[kind])
        tokens = _MOST_TOKENS[kind]

        def taken() -> int:
            blocks = 1 if block == vocabulary else 2
            weights = block * blocks * n_heads * row_bytes
            return weights + tokens * (4 * n_logits * block + token_bytes)

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
        by_origin: dict[tuple[Path, str], VariantRun] = {}
        for name, run in runs.items():
            origin = _origin(run.decoder.weights, run.decoder.model.head_name)
            self._heads[name] = by_origin.setdefault(origin, run)
        facts = self._decoder.model.facts
        self._vocabulary = facts.vocab_size
        state = facts.hidden_size * self._decoder.dtype.itemsize
        n_threads = self._decoder.crew.n_threads if self._decoder.crew else 1
        n_waiting = len(runs) * (2 * n_threads + _PARTS) + _SPAN
        self.cut = Cut.into(
            usable,
            facts.vocab_size,
            state,
            len(by_origin),
            (len(runs) + 2) * n_threads,
            self.device.type,
            state * n_waiting,
        )

    @torch.inference_mode()
    def sums(
        self, scored: Sequence[ScoredBatch], pairs: Sequence[Pair], progress: Progress
    ) -> HeadSums:
        """What all variants predict at the scored tokens, in the order of the batches."""
        n_scored = sum(len(batch.right) for batch in scored)
        sums = HeadSums(list(self._runs), pairs, n_scored, self.device)
        parts = list(_parts(scored, self.cut.tokens))
        for run in self._runs.values():
            run.decoder.load_norm()
        self._ask(0)
        with progress.task("Predictions", n_scored * self._vocabulary, "logits") as task:
            for first in range(0, self._vocabulary, self.cut.block):
                blocks = self._take(first)
                self._ask(first + self.cut.block)
                for count in self._each(parts, sums, first, blocks):
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
        self, parts: Sequence[_Part], sums: HeadSums, first: int, blocks: Mapping[str, Tensor]
    ) -> Iterator[int]:
        """Count a block of the vocabulary for all tokens, a few at a time; how many these were."""

        def count(given: tuple[_Part, Mapping[str, Tensor]]) -> int:
            part, hidden = given
            logits = {
                name: product(self._runs[name].decoder.final_norm(states), blocks[name])
                for name, states in hidden.items()
            }
            sums.add(part.place, first, logits, part.right.to(self.device))
            return len(part.right)

        crew = self._decoder.crew
        loaded = self._loaded(parts)
        return map(count, loaded) if crew is None else crew.in_order(count, loaded)

    def _loaded(self, parts: Sequence[_Part]) -> Iterator[tuple[_Part, Mapping[str, Tensor]]]:
        """The hidden states (n, H) of all variants at the tokens of each part."""
        coming = [span for part in parts for span, _ in part.pieces][1:]
        following = iter([*coming, None])
        for part in parts:
            found: dict[str, list[Tensor]] = {name: [] for name in self._runs}
            for span, at in part.pieces:
                after, places = next(following), at.to(self.device)
                for name, run in self._runs.items():
                    found[name].append(run.spool.load(span, after)[places])
            yield part, {name: torch.cat(pieces) for name, pieces in found.items()}


@dataclass(frozen=True)
class _Part:
    """Some scored tokens of a batch that are computed together."""

    place: slice  # in the arrays
    right: Tensor  # (n,) int64
    pieces: Sequence[tuple[Span, Tensor]]  # of the spool, and the places in it that are scored


def _parts(scored: Sequence[ScoredBatch], n_tokens: int) -> Iterator[_Part]:
    """The scored tokens, at most `n_tokens` at a time.

    Few of a batch's tokens may be scored: it is loaded in pieces of `_SPAN` x `n_tokens` positions.
    """
    for batch in scored:
        for begin in range(0, len(batch.right), n_tokens):
            positions = batch.positions[begin : begin + n_tokens]
            place = slice(batch.first + begin, batch.first + begin + len(positions))
            pieces: list[tuple[Span, Tensor]] = []
            for some in positions.split(_counts(positions, _SPAN * n_tokens)):
                low, high = batch.span[0] + int(some[0]), batch.span[0] + int(some[-1]) + 1
                pieces.append(((low, high), some - some[0]))
            yield _Part(place, batch.right[begin : begin + n_tokens], pieces)


def _counts(positions: Tensor, n_positions: int) -> list[int]:
    """How many of ascending positions (n,) lie in each piece of at most `n_positions`."""
    counts: list[int] = []
    while (done := sum(counts)) < len(positions):
        left = positions[done:]
        counts.append(int(torch.searchsorted(left, left[0] + n_positions)))
    return counts


def product(hidden: Tensor, block: Tensor) -> Tensor:
    """Logits (n, B) in float32 of hidden states (n, H) and rows of a head (B, H).

    Sums are in float32 also where both are bfloat16: rounded logits would differ by chance.
    """
    if hidden.is_cuda and hidden.dtype is not torch.float32:
        return torch.mm(hidden, block.t(), out_dtype=torch.float32)
    return hidden.float() @ block.float().t()


def _origin(weights: Weights, name: str) -> tuple[Path, str]:
    """The tensor's folder, and its name there: a pruned view has the tensors of its source."""
    return weights.folder, weights.origin(name)[0]
