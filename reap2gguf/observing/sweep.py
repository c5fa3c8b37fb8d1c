"""One sweep over a model: every row through every layer, one layer in memory at a time.

While a layer computes, the weights of the next one are read, and the sums of the one before come
from the GPU. Between layers the hidden states of all rows wait in a spool; from a spool on a disk
they go through several layers at once (`layer_group.py`). The host waits for the device once per
layer or group, to learn which rows are finite. An MTP block runs as one more layer, on the
positions that have a next token.

Memory: the embedding or two decoder layers (of a group: all its layers and one more), the
activations of one batch, and the spool, which is tokens x H x 2 or 4 bytes. `ComputeOptions.memory`
limits the sum (`budget.py`).

Bits: on one kind of machine and device the same rows, weights and dtype give the same sums, bit for
bit, for any number of threads (`compute/crew.py`) and any spool. The last bits may differ on
another kind of processor or GPU, with other versions of torch, with another number of processes,
and if memory is so short that batches are smaller.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from reap2gguf.errors import ObservationError
from reap2gguf.observing.allocator import frees_at_once
from reap2gguf.observing.batches import Batch, assign_spans
from reap2gguf.observing.compute.kernels import has_triton
from reap2gguf.observing.compute.ranks import host_peers, join
from reap2gguf.observing.decoder import StreamedDecoder
from reap2gguf.observing.layer_group import LayerGroup, groups_of_layers
from reap2gguf.observing.mtp import count_hits
from reap2gguf.observing.spool import Spool, open_spool
from reap2gguf.observing.state import StateKeeper, SweepState
from reap2gguf.observing.sweep_plan import (
    HasRoom,
    SweepContext,
    SweepPlan,
    gpu_errors,
    opening_notes,
    plan_sweep,
    waiting_note,
    where_to_compute,
)
from reap2gguf.observing.totals import Totals
from reap2gguf.observing.warm_up import warm_up

if TYPE_CHECKING:
    from reap2gguf.artifacts.texts import Row
    from reap2gguf.checkpoint.weights import Weights
    from reap2gguf.models.contract import MoeModel
    from reap2gguf.observing.observer import LayerObserver
    from reap2gguf.options import ComputeOptions
    from reap2gguf.progress import Progress, Task

AnySweep = TypeVar("AnySweep", bound="Sweep")
MAX_BAD_ROWS = 0.01


@dataclass(frozen=True)
class SweepReport:
    """What a sweep ran over, in all processes together."""

    n_rows: int
    n_tokens: int
    n_dropped_rows: int
    mtp_hits: int = 0  # next-next tokens of the probe that the MTP block predicted
    mtp_tokens: int = 0  # next-next tokens of the probe
    seconds_waited: float = field(default=0.0, compare=False)  # of this process, for weights


def sweep(
    weights: Weights,
    model: MoeModel,
    rows: Sequence[Row],
    observer: LayerObserver,
    options: ComputeOptions,
    title: str,
    progress: Progress,
    probe: Sequence[Row] = (),
    beside: Callable[[HasRoom], None] = lambda has_room: None,
) -> SweepReport:
    """Run all rows through the layers that `observer` wants to see.

    `beside` is called once, when the memory is divided and before the first layer, with a function
    that says whether other work in this process may take some bytes of RAM from now on: those that
    the sweep leaves.
    Raises ObservationError if more than 1 % of the rows are not finite, UsageError if the memory
    is too little, OutputError if the disk has no room for the spool, PeerError if another process
    ended.
    """
    started = time.monotonic()
    ranks = join()
    device, dtype, n_threads = where_to_compute(ranks, options)
    observer.use(device)
    peers = host_peers(ranks, device)
    decoder = StreamedDecoder(weights, model, dtype, device, n_threads, peers)
    context = SweepContext(decoder, observer, ranks, progress)
    freeing = frees_at_once() if device.type == "cpu" and options.memory else nullcontext()
    with gpu_errors(), closing(decoder), freeing:
        plan = plan_sweep(context, rows, probe, options)
        with open_sweep(context, plan, options, Sweep) as run:
            for line in opening_notes(context, plan.budget, run.spool.n_bytes):
                progress.note(line)
            run.compile_kernels()
            beside(plan.has_room)  # not before: the compilers need the interpreter themselves
            run.all_layers(title)
            hits, tried = run.count_mtp_hits() if model.facts.has_mtp else (0, 0)
    n_left = sum(len(batch.lengths) for batch in run.batches if batch.observed)
    n_left, hits, tried = ranks.total([n_left, hits, tried])
    n_tokens = sum(len(row) for row in rows)
    waited = decoder.loader.seconds_waited
    if note := waiting_note(title, waited, time.monotonic() - started):
        progress.note(note)
    return SweepReport(len(rows), n_tokens, len(rows) - n_left, hits, tried, waited)


@contextmanager
def open_sweep(
    context: SweepContext, plan: SweepPlan, options: ComputeOptions, new: type[AnySweep]
) -> Iterator[AnySweep]:
    """A sweep whose spool is open and holds the hidden states of all batches.

    They come from the state of an interrupted sweep, if there is one, else from embedded rows.
    """
    decoder = context.decoder
    width = decoder.model.facts.hidden_size
    keeper = StateKeeper(
        options.resume,
        context.observer,
        context.ranks,
        plan.budget.batch_tokens,
        context.progress.note,
    )
    with ExitStack() as stack:
        state = keeper.load(width, decoder.dtype)
        with nullcontext() if state is None else closing(state):
            if state is not None:
                plan = replace(plan, batches=state.batches, first_layer=state.layer)
            shape = (assign_spans(plan.batches), width)
            spool = open_spool(
                plan.budget.spool, shape, decoder.dtype, decoder.device, options.scratch
            )
            stack.enter_context(closing(spool))
            run = new(context, plan, keeper, spool)
            run.fill_spool(state)
        yield run


class Sweep:
    """A sweep under way: its batches, and the spool where their hidden states wait."""

    keeps_output = False  # the spool gets what comes out of the last layer

    def __init__(
        self, context: SweepContext, plan: SweepPlan, keeper: StateKeeper, spool: Spool
    ) -> None:
        self.context = context
        self.decoder = context.decoder
        self.observer = context.observer
        self.ranks = context.ranks
        self.progress = context.progress
        self.n_layers = context.n_layers
        self.plan = plan
        self.keeper = keeper
        self.spool = spool
        self.batches = plan.batches  # of the rows that are still finite
        # What a token of a batch adds to the progress in one layer. Tokens of the text are counted
        # once: when they have been through every layer, and not again in the rows of the probe.
        # The first process reports for all, which have as many tokens each as rows allow.
        n_tokens = sum(batch.n_tokens for batch in self.batches)
        observed = [sum(batch.n_tokens for batch in self.batches if batch.observed)]
        self.n_observed = self.ranks.total(observed)[0]
        self._share = self.n_observed / max(n_tokens, 1) / self.n_layers
        self._coming: list[tuple[int, Totals]] = []  # the sums of layers that have ended
        self._has_begun = False
        self.prefetches = plan.budget.prefetch  # until the GPU's memory turns out too small

    @property
    def n_lost(self) -> int:
        """Rows that were dropped since the first layer, in this process."""
        return self.plan.n_rows - sum(len(batch.lengths) for batch in self.batches)

    def fill_spool(self, state: SweepState | None) -> None:
        """Put the hidden states of every batch into the spool: saved ones, or embedded rows."""
        self.decoder.load_embedding()
        self._begin_first()
        self._fill_batches(state)
        if state is not None:
            self.progress.note(f"resuming from layer {state.layer} of {self.n_layers}")
        self.spool.flush()
        self.decoder.drop_embedding()

    @torch.inference_mode()
    def _fill_batches(self, state: SweepState | None) -> None:
        for index, batch in enumerate(self.batches):
            if state is None:
                hidden = self.decoder.embed(batch.tokens).flatten(0, 1)
            else:
                self.decoder.record(batch.tokens)
                hidden = state.hidden(index, self.decoder.dtype).to(self.decoder.device)
            self.spool.store(batch.span, hidden)

    def _begin_first(self) -> None:
        self.prefetch(self.plan.first_layer)

    def prefetch(self, index: int) -> None:
        """Begin to read a layer, if there is memory for two."""
        if not self.prefetches:
            return
        try:
            self.decoder.ask_layer(index)
        except torch.OutOfMemoryError:
            if self.ranks.size > 1:
                raise  # the others wait for this process's part of the layer
            self.prefetches = False
            self.progress.note("not enough GPU memory to prefetch weights")

    def all_layers(self, title: str) -> None:
        """Move every batch through all remaining layers, and report the progress."""
        first, depth = self.plan.first_layer, self.plan.budget.depth
        self.observer.start(first)
        with self.progress.task(title, self.n_observed, "tokens") as task:
            task.advance(first * self.n_observed / self.n_layers)
            for layers in groups_of_layers(first, self.n_layers, depth, self.decoder.mtp_layer):
                task.at(f"layer {layers[-1] + 1}/{self.n_layers}")
                self.run_layers(layers, task)
            self.collect()

    def compile_kernels(self) -> None:
        """Compile what a GPU runs, while the first layer is read, if there is memory for two."""
        if has_triton(self.decoder.device) and self.prefetches:
            layers = range(self.plan.first_layer, self.n_layers)
            warm_up(self.decoder, self.observer, layers, self.batches, self.progress)

    def run_layers(self, layers: range, task: Task) -> None:
        """Move every batch through neighbouring layers.

        On a GPU their sums are kept while the next layer computes.
        """
        group = LayerGroup(self.decoder, layers, self.observer)
        if len(layers) > 1:
            self._ask_all(layers)
        modules = [self._load(index) for index in layers]
        self._has_begun = False  # to read the next layer
        on_gpu = self.decoder.device.type == "cuda"
        if not on_gpu:
            self._begin_next(layers[-1])
        for index, module in zip(layers, modules, strict=True):
            group.attach(index, module)
        if layers[0] == self.decoder.mtp_layer:
            self.decoder.load_ends()
        flags = self._all_batches(group, task)
        self.decoder.complete_layer(layers.stop)
        self.collect()
        is_last = layers.stop == self.n_layers
        saves = not is_last and self.keeper.is_due(self.batches, self.spool)
        self.spool.flush()
        # the only time that the host waits for the device; a process may have no batch at all
        finite = torch.cat(flags, dim=1).cpu() if flags else torch.ones(len(layers), 0).bool()
        lost = [self.n_lost] * len(layers)
        if not bool(finite.all()):
            lost = self._without_bad_rows(group, finite)
        group.detach()
        self._coming = [
            (index, self._totals(observer, n_lost))
            for index, observer, n_lost in zip(layers, group.observers, lost, strict=True)
        ]
        if not on_gpu or saves:
            self.collect()
        if layers[0] != self.decoder.mtp_layer:
            for index in layers:
                self._drop(index)
        if saves:
            self.keeper.save(layers.stop, self.batches, self.spool)

    def _ask_all(self, layers: range) -> None:
        """Begin to read the layers of a group, of which the first may be on its way."""
        for index in layers:
            if not self.decoder.has_layer(index):
                self.decoder.ask_layer(index)

    def _totals(self, observer: LayerObserver, n_lost: int) -> Totals:
        losses = (self.plan.n_rows, n_lost)
        return Totals(self.ranks, self.decoder.device, observer.sums(), observer.peaks(), losses)

    def _load(self, index: int) -> torch.nn.Module:
        return self.decoder.load_layer(index)

    def _drop(self, index: int) -> None:
        self.decoder.drop_layer(index)

    def _begin_next(self, index: int) -> None:
        """Begin to read the layer after `index`."""
        if index + 1 < self.n_layers and not self._has_begun:
            self._has_begun = True
            self.decoder.fetch_layer(index + 1)
            self.prefetch(index + 1)

    def collect(self) -> None:
        """Keep the sums of the layers that have ended, if they are not kept yet."""
        coming, self._coming = self._coming, []
        for index, totals in coming:
            sums, peaks, (n_rows, lost) = totals.collect()
            if lost > MAX_BAD_ROWS * n_rows:
                raise ObservationError(
                    f"layer {index}: {lost} of {n_rows} rows are NaN or infinite, expected at most "
                    f"{MAX_BAD_ROWS:.0%}; {self.decoder.why_not_finite(index)}"
                )
            self.observer.finish(index, sums, peaks)

    def _all_batches(self, group: LayerGroup, task: Task) -> list[Tensor]:
        """Per batch, which rows are finite (layers, B). A batch that does not fit is halved."""
        way = self.plan.way(group.layers, self.decoder.device)
        waiting, done, flags = deque(self.batches[::way]), [], []
        last = group.layers[-1]
        while waiting:
            batch = waiting.popleft()
            try:
                hidden = self.spool.load(batch.span, waiting[0].span if waiting else None)
                flags.append(self._through(group, batch, hidden))
            except torch.OutOfMemoryError as error:
                group.discard()
                waiting.extendleft(reversed(self._halved(batch, error)))
                continue
            done.append(batch)
            # after the first batch, so that a GPU has something to do meanwhile
            self._begin_next(last)
            task.advance(batch.n_tokens * self._share * len(group.layers))
        self._begin_next(last)  # a process may have no batch
        self.batches = done[::way]
        return flags[::way]

    @torch.inference_mode()
    def _through(
        self, group: LayerGroup, batch: Batch, hidden: Tensor, n_counted: int = 0
    ) -> Tensor:
        """Run one batch through a group, into the spool; which rows are finite, (layers, B).

        If any row is not finite, the layer that made it so and those after it count nothing, and
        the spool keeps the group's input. `n_counted` layers have counted the batch already.
        """
        output, finite = group.run(batch, hidden, n_counted)
        is_last = group.layers.stop == self.n_layers
        if not is_last or self.keeps_output or not batch.observed:  # a probe's hits are counted
            self.spool.replace(batch.span, finite.all(), output.flatten(0, 1), hidden)
        group.commit()
        return finite

    @torch.inference_mode()
    def _without_bad_rows(self, group: LayerGroup, finite: Tensor) -> list[int]:
        """Drop rows that are not finite, and run their batches again without them.

        Returns how many rows are lost after each layer, since the first one of the model.
        """
        lost = [self.n_lost] * len(group.layers)
        first = 0
        for batch in self.batches:
            rows = finite[:, first : first + len(batch.lengths)]
            first += rows.shape[1]
            n_counted = 0
            while not bool(rows.all()):
                bad = int((~rows.all(dim=1)).int().argmax())  # the first layer
                left, n_counted = rows[bad], max(n_counted, bad)
                for number in range(bad, len(lost)):
                    lost[number] += int((~left).sum())
                hidden = self.spool.load(batch.span).view(*batch.tokens.shape, -1)
                hidden = hidden[left.to(hidden.device)].flatten(0, 1)
                batch.keep(left)
                if not len(batch.lengths):
                    break
                self.spool.store(batch.span, hidden)
                rows = self._through(group, batch, hidden, n_counted).cpu()
                self.spool.flush()
        self.batches = [batch for batch in self.batches if len(batch.lengths)]
        return lost

    def _halved(self, batch: Batch, error: torch.OutOfMemoryError) -> tuple[Batch, Batch]:
        n_tokens = batch.tokens.numel()
        if len(batch.lengths) == 1:
            raise ObservationError(
                f"not enough GPU memory for one row of {n_tokens:,} tokens; use a smaller "
                "--max-length, or --device cpu"
            ) from error
        torch.cuda.empty_cache()
        self.progress.note(
            f"not enough GPU memory for a batch of {n_tokens:,} tokens; splitting it in half"
        )
        return batch.halves()

    def count_mtp_hits(self) -> tuple[int, int]:
        """How many next-next tokens of the probe the MTP block predicted, and of how many."""
        hits = tried = 0
        for batch in self.batches:
            if batch.observed:
                continue
            hidden = self.spool.load(batch.span).view(*batch.tokens.shape, -1)
            found = count_hits(self.decoder.mtp_best(hidden), batch.tokens, batch.lengths)
            hits, tried = hits + found[0], tried + found[1]
        return hits, tried
