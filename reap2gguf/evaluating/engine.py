"""Many variants of a model through their layers, side by side: the engine of every evaluation.

For each layer, each variant takes all rows through it before the next layer begins; the weights of
one variant's layer are in memory, and the next one's are being read. A pruned model that is a view
of another variant is not read again. Then the heads of all variants predict the scored tokens
(`head.py`).

Memory: two layers of the largest variant, the activations of one batch, and the hidden states of
all variants, on the device, in RAM or on disk (`observing/budget.py`); nothing grows with the
vocabulary. `ComputeOptions.memory` limits the sum.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from reap2gguf.errors import EvaluationError, UsageError
from reap2gguf.evaluating.head import Head, scored_batches
from reap2gguf.evaluating.outside import outside_scores
from reap2gguf.evaluating.run import Unobserved, VariantRun
from reap2gguf.evaluating.scores import Scores, VariantScores
from reap2gguf.observing.allocator import frees_at_once, return_free_memory
from reap2gguf.observing.batches import padded_batches
from reap2gguf.observing.budget import Budget, fit
from reap2gguf.observing.compute.ranks import Ranks, connect_on, host_peers, join
from reap2gguf.observing.decoder import SharedThreads, StreamedDecoder
from reap2gguf.observing.sweep import open_sweep
from reap2gguf.observing.sweep_plan import (
    SweepContext,
    SweepPlan,
    available_memory,
    gpu_errors,
    groups_of,
    limit_gpu_memory,
    need_of,
    opening_notes,
    resolve_device,
)
from reap2gguf.pruning.view import PrunedView

if TYPE_CHECKING:
    from reap2gguf.evaluating.figures import Doubles
    from reap2gguf.evaluating.kept import KeptScores
    from reap2gguf.evaluating.outside import Outside
    from reap2gguf.evaluating.scores import Pair, ScoredRow
    from reap2gguf.evaluating.variants import Variant
    from reap2gguf.options import ComputeOptions
    from reap2gguf.progress import Progress


def evaluate_variants(
    variants: Sequence[Variant],
    rows: Sequence[ScoredRow],
    pairs: Sequence[Pair],
    options: ComputeOptions,
    progress: Progress,
    alone: bool = False,
    outside: Sequence[Outside] = (),
    kept: KeptScores | None = None,
) -> Scores:
    """What every variant predicts at the scored tokens of all rows, and how far `pairs` are apart.

    Every process of torchrun computes its share of the rows and returns all scores; `alone`: the
    others have left, and this one computes all rows. Variants of `outside` are computed by another
    program, after the others and in one process; they may be the second of a pair. What each of
    them gives is put into `kept`, and not computed if it is there.
    Raises EvaluationError if variants do not fit together or compute what is not finite, and
    UsageError, OutputError, CheckpointError, ArtifactError and PeerError as a sweep does.
    """
    _check(variants, rows)
    ranks = Ranks() if alone else join()
    device, dtype = resolve_device(options)
    n_threads = max(1, options.threads // ranks.on_machine)
    if device.type == "cuda":
        torch.set_num_threads(n_threads)  # on a CPU the crew sets them
    connect_on(ranks, device)
    limit_gpu_memory(device, options.memory)
    with gpu_errors(), ExitStack() as stack:
        if device.type == "cpu" and options.memory is not None:
            stack.enter_context(frees_at_once())
        threads = stack.enter_context(closing(SharedThreads(device, n_threads)))
        peers = host_peers(ranks, device)
        contexts: list[SweepContext] = []
        for variant in variants:
            decoder = StreamedDecoder(
                variant.weights, variant.model, dtype, device, n_threads, peers, threads
            )
            stack.enter_context(closing(decoder))
            contexts.append(SweepContext(decoder, Unobserved(variant.model), ranks, progress))
        evaluation = _Evaluation(variants, contexts, rows, options, progress)
        evaluation.open(stack)
        evaluation.all_layers()
        return evaluation.scores(pairs, outside, kept)


def _check(variants: Sequence[Variant], rows: Sequence[ScoredRow]) -> None:
    """Refuse variants that have other layers or tokens than the first, and rows without tokens."""
    first = variants[0]
    for variant in variants:
        for what in ("n_layers", "hidden_size", "vocab_size"):
            found, expected = (getattr(one.model.facts, what) for one in (variant, first))
            if found != expected:
                raise EvaluationError(
                    f"{variant.name}: {what} is {found}, but {first.name} has {expected}; only "
                    "variants of one model are evaluated together"
                )
    if sum(row.n_scored for row in rows) < 1:
        raise UsageError("no token is scored; give more text")


@dataclass(frozen=True)
class _Numbered:
    """A row, and its number among all."""

    number: int
    row: ScoredRow

    def __len__(self) -> int:
        return len(self.row.tokens)


class _Evaluation:
    """An evaluation under way."""

    def __init__(
        self,
        variants: Sequence[Variant],
        contexts: Sequence[SweepContext],
        rows: Sequence[ScoredRow],
        options: ComputeOptions,
        progress: Progress,
    ) -> None:
        self._variants = variants
        self._contexts = contexts
        self._rows = rows
        self._options = options
        self._progress = progress
        self._ranks: Ranks = contexts[0].ranks
        self._device = contexts[0].decoder.device
        self._runs: list[VariantRun] = []
        self._divide()

    def _divide(self) -> None:
        """Divide memory and rows, of all variants in the same way."""
        tokens = [row.tokens for row in self._rows]
        needs = [need_of(context, tokens) for context in self._contexts]
        # of two layers in memory; a third one, if several views are made of one layer
        sources = [
            one.weights.source for one in self._variants if isinstance(one.weights, PrunedView)
        ]
        share = 1.5 if len(sources) > len(set(map(id, sources))) else 1
        self._need = replace(
            needs[0],
            layer=int(share * max(need.layer for need in needs)),
            position=max(need.position for need in needs),
            embedding=max(need.embedding for need in needs),
            n_positions=sum(need.n_positions for need in needs),
        )
        options = self._options
        self._memory = available_memory(self._device, self._ranks, options.memory)
        self._budget: Budget = fit(self._need, self._device.type, self._memory, options.spool)
        numbered = [_Numbered(number, row) for number, row in enumerate(self._rows)]
        self._groups = groups_of(numbered, self._budget.batch_tokens, self._ranks, self._device)

    def open(self, stack: ExitStack) -> None:
        """Embed all rows for every variant, or take up where an earlier evaluation ended."""
        for number, context in enumerate(self._contexts):
            groups = [[one.row.tokens for one in group] for group in self._groups]
            batches = padded_batches(groups, observed=True)
            n_rows = sum(map(len, groups))
            plan = SweepPlan(self._budget, batches, n_rows, lambda n_bytes: False)
            run = stack.enter_context(
                open_sweep(context, plan, self._own_options(number), VariantRun)
            )
            self._runs.append(run)
        for run, variant in zip(self._runs, self._variants, strict=True):
            self._join_to_base(run, variant)
        n_bytes = sum(run.spool.n_bytes for run in self._runs)
        for line in opening_notes(self._contexts[0], self._budget, n_bytes):
            self._progress.note(line)

    def _own_options(self, number: int) -> ComputeOptions:
        """The options with a file of its own for the state between layers."""
        resume = self._options.resume
        if resume is None:
            return self._options
        path = resume.path.with_name(f"{resume.path.name}.{number}")
        key = f"{resume.key}.{number}"
        return replace(self._options, resume=replace(resume, path=path, key=key))

    def _join_to_base(self, run: VariantRun, variant: Variant) -> None:
        """Let a pruned view take over the weights of the variant that it is a view of."""
        view = variant.weights
        if not isinstance(view, PrunedView):
            return
        for base, other in zip(self._runs, self._variants, strict=True):
            if other.weights is view.source and run.base is None:
                run.base, run.kept, run.replaced = base, view.kept, view.replaced
                base.n_views += 1

    def all_layers(self) -> None:
        """Every variant through every layer; a view follows its base at once."""
        order = sorted(self._runs, key=lambda run: (self._rank_of(run), run.base is not None))
        n_layers = self._contexts[0].n_layers
        steps = [
            (index, run)
            for index in range(n_layers)
            for run in order
            if index >= run.plan.first_layer
        ]
        kinds = {run.decoder.model.facts.n_experts: run for run in order}
        for run in kinds.values():
            run.compile_kernels()
        total = self._runs[0].n_observed * len(self._runs)
        with self._progress.task("Evaluating", total, "tokens") as task:
            skipped = sum(run.plan.first_layer for run in self._runs)
            task.advance(skipped * self._runs[0].n_observed / n_layers)
            for place, (index, run) in enumerate(steps):
                run.begin_next = _Reading(steps[place + 1 :])
                task.at(f"layer {index + 1}/{n_layers}")
                run.run_layers(range(index, index + 1), task)
                run.collect()
                if self._device.type == "cpu":
                    return_free_memory()

    def _rank_of(self, run: VariantRun) -> int:
        """The place of a variant, of a view that of its base."""
        return self._runs.index(run.base or run)

    def scores(
        self, pairs: Sequence[Pair], outside: Sequence[Outside], kept: KeptScores | None
    ) -> Scores:
        """What all variants predict, after the last layer."""
        names = [variant.name for variant in self._variants]
        runs = dict(zip(names, self._runs, strict=True))
        groups = [[one.row for one in group] for group in self._groups]
        spread = _Spread(self._rows, self._groups, self._ranks)
        own = [pair for pair in pairs if set(pair) <= runs.keys()]
        batches = scored_batches(self._runs[0].batches, groups)
        sums = Head(runs, self._usable_by_heads).sums(batches, own, self._progress)
        variants = {name: spread.scores(sums.nll(name), sums.top(name)) for name in names}
        apart = {pair: spread.divergences(sums.divergence(pair)) for pair in own}
        del sums
        for other in outside:
            theirs = [pair for pair in pairs if pair[1] == other.name]
            found = None if kept is None else kept.get(other.name, self._rows, theirs)
            if found is None:
                found = self._from_outside(other, runs, theirs, spread)
                if kept is not None:
                    kept.put(other.name, found)
            variants |= found.variants
            apart |= found.divergences
        for name, one in variants.items():
            if not np.isfinite(one.nll).all():
                raise EvaluationError(
                    f"{name}: its head computes NaN or infinite logits; it cannot be evaluated"
                )
        return Scores(self._rows, variants, {pair: apart[pair] for pair in pairs})

    def _from_outside(
        self, other: Outside, runs: Mapping[str, VariantRun], pairs: Sequence[Pair], spread: _Spread
    ) -> Scores:
        """What another program gives all scored tokens, in the order of the rows."""
        groups = [[one.row for one in group] for group in self._groups]
        usable = self._usable_by_heads
        found, apart = outside_scores(other, runs, groups, pairs, usable, self._progress)
        return Scores(
            self._rows,
            {other.name: spread.scores(torch.from_numpy(found.nll), torch.from_numpy(found.top))},
            {pair: spread.divergences(torch.from_numpy(one)) for pair, one in apart.items()},
        )

    @property
    def _usable_by_heads(self) -> int:
        """Bytes of the device that hidden states leave."""
        on_device = self._need.n_positions * self._need.hidden if self._on_device else 0
        return self._memory.usable - on_device

    @property
    def _on_device(self) -> bool:
        return self._budget.spool == "device"


class _Reading:
    """Begins to read the next layer of those that are to come which is read at all."""

    def __init__(self, coming: Sequence[tuple[int, VariantRun]]) -> None:
        self._coming = coming

    def __call__(self) -> None:
        for index, run in self._coming:
            if not run.takes_over(index):
                run.begin(index)
                return


class _Spread:
    """Puts what this process found in the order of the rows, and adds what the others found."""

    def __init__(
        self, rows: Sequence[ScoredRow], groups: Sequence[Sequence[_Numbered]], ranks: Ranks
    ) -> None:
        ends = np.cumsum([row.n_scored for row in rows])
        places = [
            np.arange(ends[one.number] - one.row.n_scored, ends[one.number])
            for group in groups
            for one in group
        ]
        self._n_scored = int(ends[-1])
        self._is_compared = np.concatenate([np.full(row.n_scored, row.is_compared) for row in rows])
        self._places = torch.from_numpy(np.concatenate([np.empty(0, np.int64), *places]))
        self._ranks = ranks

    def scores(self, nll: torch.Tensor, top: torch.Tensor) -> VariantScores:
        """What a variant gives the tokens of this process, in the order of all."""
        return VariantScores(self._floats(nll), self._floats(top).astype(np.int64))

    def divergences(self, found: torch.Tensor) -> Doubles:
        """The same of divergences: NaN in rows that are not compared."""
        everything = self._floats(found)
        everything[~self._is_compared] = np.nan
        return everything

    def _floats(self, found: torch.Tensor) -> Doubles:
        """Values (n,) of this process's tokens in the order of its batches -> (S,) of all."""
        everything = torch.zeros(self._n_scored, dtype=torch.float64, device=found.device)
        everything[self._places.to(found.device)] = found.double()
        self._ranks.sum_tensors([everything])
        return everything.cpu().numpy()
