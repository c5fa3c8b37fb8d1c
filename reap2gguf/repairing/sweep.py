"""The sweep that repairs a pruned model: one layer after another, each on the repaired ones before.

For each layer with experts: all rows run through its pruned and its original side (`capture.py`),
the kept experts' `down_proj` is fitted (`layer.py`) and kept in the work folder (`record.py`), and
the rows run through the layer with its new weights. Rows, batches, spools, weights and the state
between layers are those of any sweep (`observing/sweep.py`).

A layer whose file is there is not fitted again: its weights are taken from the file. So a repair
that was interrupted is resumed, and ends with the same bytes.

Memory: see `budget.py`. Bits: as a sweep's, and those of the solver, which does not depend on the
number of threads; another way of holding the Gram matrix, or another kind of machine, may round
differently.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from reap2gguf.errors import ObservationError
from reap2gguf.observing.allocator import frees_at_once
from reap2gguf.observing.compute.experts import watch
from reap2gguf.observing.compute.ranks import Ranks
from reap2gguf.observing.decoder import SharedThreads, StreamedDecoder
from reap2gguf.observing.loader import TORCH_TYPES, WeightLoader
from reap2gguf.observing.narrowed import narrowed
from reap2gguf.observing.observer import Arrays, LayerObserver
from reap2gguf.observing.spool import open_spool
from reap2gguf.observing.sweep import Sweep, open_sweep
from reap2gguf.observing.sweep_plan import (
    SweepContext,
    gpu_errors,
    limit_gpu_memory,
    opening_notes,
    resolve_device,
)
from reap2gguf.observing.targets import layer_targets
from reap2gguf.repairing.budget import RepairPlan, plan_repair
from reap2gguf.repairing.capture import Sides, capture
from reap2gguf.repairing.features import Features, ModuleExperts
from reap2gguf.repairing.layer import fit_layer
from reap2gguf.repairing.limits import check_repairable, check_rows, repaired_layers
from reap2gguf.repairing.stored import new_tensors

if TYPE_CHECKING:
    from reap2gguf.artifacts.texts import Row
    from reap2gguf.models.contract import MoeModel
    from reap2gguf.observing.compute.experts import RoutedPairs
    from reap2gguf.options import ComputeOptions
    from reap2gguf.progress import Progress
    from reap2gguf.pruning.view import PrunedView
    from reap2gguf.repairing.features import Rows
    from reap2gguf.repairing.fit import LayerFit
    from reap2gguf.repairing.layer import RepairKind
    from reap2gguf.repairing.record import RepairedLayer, RepairFolder

_TITLE = "Repairing experts"


def repair(
    pruned: PrunedView,
    rows: Sequence[Row],
    kind: RepairKind,
    folder: RepairFolder,
    options: ComputeOptions,
    progress: Progress,
    way: str | None = None,
) -> dict[int, RepairedLayer]:
    """Fit every layer's `down_proj` to the original layer on `rows`; the tensors are in `folder`.

    `way`: how the Gram matrix is held, one of `gram_size.WAYS`; None: as the memory allows.
    Raises UsageError for too few rows, too little memory or several processes,
    UnsupportedModelError for experts that it is not defined for, and what a sweep raises.
    """
    check_repairable(pruned.source_model)
    check_rows(len(rows))
    device, dtype = resolve_device(options)
    if device.type == "cuda":
        torch.set_num_threads(options.threads)  # on a CPU the crew sets them
    limit_gpu_memory(device, options.memory)
    threads = SharedThreads(device, options.threads)
    settings = dtype, device, options.threads, None, threads
    freeing = frees_at_once() if device.type == "cpu" and options.memory else nullcontext()
    with (
        gpu_errors(),
        closing(threads),
        closing(StreamedDecoder(pruned.source, pruned.source_model, *settings)) as original,
        closing(StreamedDecoder(pruned, pruned.model, *settings)) as decoder,
        freeing,
    ):
        observer = _Repaired(pruned.model, folder)
        context = SweepContext(decoder, observer, Ranks(), progress)
        plan = plan_repair(context, original, rows, options, kind, way)
        with open_sweep(context, plan.sweep, options, _RepairRun) as run:
            run.work = _Work(pruned, original, folder, kind, plan, options, threads)
            for line in opening_notes(context, plan.sweep.budget, run.spool.n_bytes):
                progress.note(line)
            progress.note(plan.note)
            run.begin(run.plan.first_layer)
            run.all_layers(_TITLE)
    return folder.load_all(repaired_layers(pruned.model))


class _Repaired(LayerObserver):
    """Watches nothing; the layers that are done are files."""

    def __init__(self, model: MoeModel, folder: RepairFolder | None = None) -> None:
        super().__init__(model)
        self._folder = folder

    def last_layer(self) -> int:
        return repaired_layers(self._model)[-1]

    def attach(self, index: int, layer: torch.nn.Module) -> None:
        """Have padding left out."""
        if index in self._model.facts.moe_layers:
            watch(layer.get_submodule(self._model.experts_path(index)), self)

    def see(self, pairs: RoutedPairs) -> None:
        """Nothing is counted."""

    def finish(self, index: int, sums: Sequence[Tensor], peaks: Sequence[Tensor]) -> None:
        """Nothing is kept."""

    def sums(self) -> Iterable[Tensor]:
        return ()

    def finished_sums(self) -> Arrays:
        """The layers that a saved state of hidden states depends on."""
        folder = self._folder
        assert folder is not None
        done = [layer for layer in repaired_layers(self._model) if folder.file(layer).is_file()]
        return {"done": np.array(done, dtype=np.int64)}

    def restore(self, arrays: Arrays) -> None:
        assert self._folder is not None
        for layer in arrays["done"].tolist():
            if self._folder.load(layer) is None:
                raise ValueError(f"the file of layer {layer} is missing")


@dataclass(frozen=True)
class _Work:
    """What a repair needs beside its sweep."""

    pruned: PrunedView
    original: StreamedDecoder
    folder: RepairFolder
    kind: RepairKind
    plan: RepairPlan
    options: ComputeOptions
    threads: SharedThreads


class _RepairRun(Sweep):
    """A repair under way: the rows' hidden states in the pruned model, and the layers so far."""

    work: _Work

    def _begin_first(self) -> None:
        """The original's layers are read once it is known."""

    def begin(self, index: int) -> None:
        """Begin to read a layer of the original."""
        self.work.original.fetch_layer(index)
        self.prefetch(index)

    def prefetch(self, index: int) -> None:
        if not self.prefetches:
            return
        try:
            self.work.original.ask_layer(index)
        except torch.OutOfMemoryError:
            self.prefetches = False
            self.progress.note("not enough GPU memory to prefetch weights")

    def _begin_next(self, index: int) -> None:
        if index + 1 < self.n_layers and not self._has_begun:
            self._has_begun = True
            self.begin(index + 1)

    def _load(self, index: int) -> torch.nn.Module:
        """The pruned layer with its new weights, which are fitted if they are not there yet."""
        work, is_repaired = self.work, index in repaired_layers(self.decoder.model)
        whole = work.original.load_layer(index)
        is_done = not is_repaired or work.folder.load(index) is not None
        layer = self._narrowed(index, work.original.layer_tensors(index), in_place=is_done)
        if not is_done:
            try:
                self._fit(Sides(index, self.decoder, work.original, layer, whole))
            except ObservationError as error:
                raise ObservationError(f"layer {index}: {error}") from error
        work.original.drop_layer(index)
        if is_repaired:
            self._put_in_place(index, layer)
        return layer

    def _narrowed(self, index: int, tensors: dict[str, Tensor], in_place: bool) -> torch.nn.Module:
        shapes, kept = self.decoder.layer_shapes(index), self.work.pruned.kept.get(index, ())
        return self.decoder.place_layer(index, narrowed(tensors, shapes, kept, in_place))

    def _fit(self, sides: Sides) -> None:
        """Fit a layer and write its file."""
        work, decoder = self.work, self.decoder
        shape = (self.spool.shape[0], decoder.model.facts.expert_io_width)
        kind, where = work.plan.sweep.budget.spool, (decoder.dtype, decoder.device)
        with (
            closing(open_spool(kind, shape, *where, work.options.scratch)) as inputs,
            closing(open_spool(kind, shape, *where, work.options.scratch)) as errors,
        ):
            rows = capture(sides, self.batches, self.spool, inputs, errors)
            experts = ModuleExperts(sides.pruned_layer.get_submodule(sides.path))
            original = self._down(work.pruned, sides.index)
            n_experts, hidden, width = original.shape
            flat = original.transpose(1, 2).reshape(-1, hidden)
            stored = TORCH_TYPES[self._stored_type(sides.index)]
            fit, weights = fit_layer(
                self._features(experts, rows.fitted),
                self._features(experts, rows.held_out),
                flat,
                lambda values: values.to(stored).to(values.dtype),
                work.kind,
                work.plan.way,
            )
        down: Mapping[int, Tensor] = {}
        if weights is not None:
            down = dict(enumerate(weights.view(n_experts, width, hidden).transpose(1, 2).cpu()))
        tensors = new_tensors(work.pruned, sides.index, {"down": down})
        work.folder.save(sides.index, fit, tensors)
        self.progress.note(fit_text(sides.index, fit))

    def _features(self, experts: ModuleExperts, rows: Rows) -> Features:
        device, crew = self.decoder.device, self.decoder.crew
        work = torch.float64 if device.type == "cpu" else torch.float32
        return Features(experts, rows, device, work, map if crew is None else crew.in_order)

    def _stored_type(self, index: int) -> str:
        weights = self.work.pruned
        slab = weights.model.expert_tensors(index, weights.tensors)["down"].slabs[0]
        return weights.tensors[slab.stored].dtype

    def _down(self, weights: PrunedView, index: int) -> Tensor:
        """The stored `down_proj` of a layer, (E, H, F) float32, where it is computed."""
        model = weights.model
        targets = layer_targets(weights, model, index, torch.float32, widen_experts=True)
        name = f"{model.experts_path(index)}.down_proj"
        loader = WeightLoader(weights, self.decoder.device, self.work.threads.readers)
        loader.ask(name, {name: targets[name]})
        return loader.take(name)[name]

    @torch.inference_mode()
    def _put_in_place(self, index: int, layer: torch.nn.Module) -> None:
        """Give a layer the weights in its file, if it has any."""
        from reap2gguf.pruning.replaced import ReplacedView

        with self.work.folder.open([index]) as stored:
            if stored.tensors:
                down = self._down(ReplacedView(self.work.pruned, stored), index)
                experts = layer.get_submodule(self.decoder.model.experts_path(index))
                experts.down_proj.copy_(down)  # type: ignore[operator]


def fit_text(layer: int, fit: LayerFit) -> str:
    """What a layer's repair came to, in one line."""
    if fit.alpha is None:
        return f"layer {layer}: error {fit.error_before:.4f}, no repair is better; kept as it is"
    return (
        f"layer {layer}: error {fit.error_before:.4f} -> {fit.error_after:.4f}, alpha {fit.alpha:g}"
    )
