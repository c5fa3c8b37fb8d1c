"""Variants that another program computes, beside the streamed ones.

Such a program gives the logits of one token after the other, each with the whole vocabulary, and
gives them once. So here tokens come first, and not blocks of the vocabulary: for a few tokens the
logits of the streamed variants are computed and put beside those of the other program. The heads
stay in memory if they take at most half of it, else they are read again for every such step.

Memory on the device: `usable`, of which at most 2 GiB are logits; and in RAM what is read at a
time.

Letters: V vocabulary, H hidden, n tokens that are computed together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from reap2gguf.errors import EvaluationError
from reap2gguf.evaluating.head import logits_of, parts_of, scored_batches
from reap2gguf.evaluating.head_sums import HeadSums
from reap2gguf.evaluating.head_weights import Blocks, HeadWeights
from reap2gguf.evaluating.scores import VariantScores

if TYPE_CHECKING:
    from reap2gguf.evaluating.figures import Doubles
    from reap2gguf.evaluating.head import Part, ScoredBatch
    from reap2gguf.evaluating.run import VariantRun
    from reap2gguf.evaluating.scores import Pair, ScoredRow
    from reap2gguf.progress import Progress

_MOST_TOKENS = 2048
_LEAST_TOKENS = 16
_LEAST_BLOCK = 256
_MOST_LOGITS = 2**31  # bytes


class Logits(Protocol):
    """The logits of scored tokens, in their order."""

    n_tokens: int  # V

    def read(self, count: int) -> npt.NDArray[np.float32]:
        """Those of the next `count` tokens, (count, V)."""


class Outside(Protocol):
    """A variant that another program computes."""

    @property
    def name(self) -> str: ...

    def logits(self, rows: Sequence[ScoredRow]) -> AbstractContextManager[Logits]:
        """The logits of all scored tokens of the rows, which have nothing in place of a token."""

    def scores(self, rows: Sequence[ScoredRow]) -> VariantScores:
        """What it gives the scored tokens of such rows."""


@dataclass(frozen=True)
class Step:
    """How many tokens of the text and of the vocabulary are computed together."""

    tokens: int
    block: int

    @classmethod
    def into(cls, usable: int, vocabulary: int, row_bytes: int, n_logits: int) -> Step:
        """The largest step that fits into `usable` bytes; the smallest one if none does.

        `row_bytes`: of all heads for one token of the vocabulary; `n_logits`: arrays of logits that
        are there at the same time.
        """
        block = vocabulary
        if block * row_bytes > usable // 2:
            # two blocks of each head, of which one is being read
            block = max(_LEAST_BLOCK, min(vocabulary, usable // 4 // row_bytes))
        held = block * row_bytes * (1 if block == vocabulary else 2)
        most = min(usable - held, _MOST_LOGITS) // (4 * vocabulary * n_logits)
        return cls(max(_LEAST_TOKENS, min(_MOST_TOKENS, most)), block)


class Beside:
    """Puts the logits of another program beside those of streamed variants."""

    def __init__(self, runs: Mapping[str, VariantRun], usable: int) -> None:
        """`runs` have been through all layers; `usable`: bytes of the device."""
        self._runs = runs
        self._decoder = next(iter(runs.values())).decoder
        self._weights = HeadWeights(runs)
        facts = self._decoder.model.facts
        row_bytes = self._weights.n_heads * facts.hidden_size * self._decoder.dtype.itemsize
        # of each streamed variant, of the other program as read and as moved, and two of the sums
        n_logits = len(runs) + 4
        self.step = Step.into(usable, self._weights.vocabulary, row_bytes, n_logits)
        self._whole: Blocks | None = None  # the heads, if they stay in memory

    @torch.inference_mode()
    def sums(
        self,
        outside: Outside,
        scored: Sequence[ScoredBatch],
        rows: Sequence[ScoredRow],
        pairs: Sequence[Pair],
        progress: Progress,
    ) -> HeadSums:
        """What all predict at the scored tokens of `rows`, which are those of `scored` in order.

        Raises EvaluationError if the other program has another vocabulary, and what it raises.
        """
        n_scored = sum(len(batch.right) for batch in scored)
        sums = HeadSums([*self._runs, outside.name], pairs, n_scored, self._decoder.device)
        for run in self._runs.values():
            run.decoder.load_norm()
        with (
            progress.task(f"Predictions of {outside.name}", n_scored, "tokens") as task,
            outside.logits(rows) as stream,
        ):
            if stream.n_tokens != self._weights.vocabulary:
                raise EvaluationError(
                    f"{outside.name}: it has {stream.n_tokens:,} tokens, but the model has "
                    f"{self._weights.vocabulary:,}; only variants of one model are compared"
                )
            for part in parts_of(scored, self._runs, self.step.tokens):
                own = self._logits(part)
                theirs = torch.from_numpy(stream.read(len(part.right)))
                own[outside.name] = theirs.to(self._decoder.device)
                self._add(part, own, sums)
                task.advance(len(part.right))
        return sums

    def _logits(self, part: Part) -> dict[str, Tensor]:
        """Of each streamed variant, (n, V) float32."""
        shape = len(part.right), self._weights.vocabulary
        normed = {
            name: self._runs[name].decoder.final_norm(hidden)
            for name, hidden in part.hidden.items()
        }
        found = {name: torch.empty(shape, device=self._decoder.device) for name in normed}
        for first, blocks in self._blocks():

            def fill(own: slice, first: int = first, blocks: Blocks = blocks) -> None:
                for name, hidden in normed.items():
                    block = blocks[name]
                    logits = logits_of(self._runs[name], hidden[own], block)
                    found[name][own, first : first + len(block)] = logits

            self._each(fill, shape[0])
        return found

    def _blocks(self) -> Iterable[tuple[int, Blocks]]:
        if self.step.block < self._weights.vocabulary:
            return self._weights.blocks(self.step.block)
        if self._whole is None:
            ((_, self._whole),) = self._weights.blocks(self.step.block)
        return [(0, self._whole)]

    def _add(self, part: Part, logits: Mapping[str, Tensor], sums: HeadSums) -> None:
        def add(own: slice) -> None:
            place = slice(part.place.start + own.start, part.place.start + own.stop)
            some = {name: found[own] for name, found in logits.items()}
            sums.add(place, 0, some, part.right[own])

        self._each(add, len(part.right))

    def _each(self, work: Callable[[slice], None], count: int) -> None:
        """`work` on all of `count` tokens, shared by the threads of a CPU."""
        crew = self._decoder.crew
        if crew is None:
            work(slice(0, count))
            return
        size = -(-count // crew.n_threads)
        slices = [slice(at, min(at + size, count)) for at in range(0, count, size)]
        for _ in crew.in_order(work, slices):
            pass


def outside_scores(
    outside: Outside,
    runs: Mapping[str, VariantRun],
    groups: Sequence[Sequence[ScoredRow]],
    pairs: Sequence[Pair],
    usable: int,
    progress: Progress,
) -> tuple[VariantScores, dict[Pair, Doubles]]:
    """What another program gives all scored tokens, and how far it is from references in `runs`.

    All in the order of `groups`, the rows of the batches of all `runs`; divergences of rows that
    are not compared are NaN. Raises what the program raises, and see `Beside.sums`.
    """
    pairs = [pair for pair in pairs if pair[1] == outside.name]
    references = {name: run for name, run in runs.items() if name in {pair[0] for pair in pairs}}

    def is_chosen(row: ScoredRow) -> bool:
        return row.is_compared and bool(pairs)

    rows = [row for group in groups for row in group]
    chosen = np.concatenate([np.full(row.n_scored, is_chosen(row)) for row in rows])
    nll, top = np.empty(len(chosen)), np.empty(len(chosen), np.int64)
    apart = {pair: np.full(len(chosen), np.nan) for pair in pairs}
    if chosen.any():
        scored = scored_batches(next(iter(references.values())).batches, groups, is_chosen)
        own = [one for row in rows if is_chosen(row) for one in row.apart()]
        sums = Beside(references, usable).sums(outside, scored, own, pairs, progress)
        nll[chosen], top[chosen] = sums.nll(outside.name).cpu(), sums.top(outside.name).cpu()
        for pair in pairs:
            apart[pair][chosen] = sums.divergence(pair).cpu()
    if not chosen.all():
        own = [one for row in rows if not is_chosen(row) for one in row.apart()]
        found = outside.scores(own)
        nll[~chosen], top[~chosen] = found.nll, found.top
    return VariantScores(nll, top), apart
