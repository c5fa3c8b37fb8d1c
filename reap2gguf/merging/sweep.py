"""The sweep that merges experts: one layer after another.

For each layer with experts, all rows run through the layer of the source (`capture.py`), its groups
are found and their matrices averaged (`layer.py`), and both are kept in the work folder. With REAM
the rows then run through the merged layer, so that each layer is merged by what reaches it in the
model that is merged so far. HC-SMoE compares the experts of the source: there the rows run on
through its layers. Rows, batches, spools, weights and the state between layers are those of any
sweep (`observing/sweep.py`).

A multi-token-prediction block comes last. It is pruned, by REAP, and merges nothing.

A layer whose file is there is not merged again, so a merge that was interrupted goes on to the same
bytes. Routers keep the rows of the experts that stay, as they are in the source.

Memory: see `budget.py`. Bits: as a sweep's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from reap2gguf.errors import ObservationError, UnsupportedModelError
from reap2gguf.merging.budget import plan_merge
from reap2gguf.merging.capture import Captured, capture
from reap2gguf.merging.layer import MergeSpec, hc_merge, merged_matrices, ream_merge
from reap2gguf.merging.limits import check_mergeable, merged_layers
from reap2gguf.merging.merge import Group, LayerMerge
from reap2gguf.merging.statistics import ReamSums, TtmSums
from reap2gguf.models.description import Router
from reap2gguf.observing.allocator import frees_at_once
from reap2gguf.observing.compute.experts import watch
from reap2gguf.observing.compute.ranks import Ranks
from reap2gguf.observing.decoder import SharedThreads, StreamedDecoder
from reap2gguf.observing.loader import WeightLoader
from reap2gguf.observing.narrowed import narrowed
from reap2gguf.observing.saliency import SaliencyObserver
from reap2gguf.observing.sweep import Sweep, open_sweep
from reap2gguf.observing.sweep_plan import (
    SweepContext,
    gpu_errors,
    limit_gpu_memory,
    opening_notes,
    resolve_device,
)
from reap2gguf.observing.targets import expert_target
from reap2gguf.pruning.methods import OBSERVED
from reap2gguf.pruning.replaced import ReplacedView
from reap2gguf.pruning.select import keep_best, scores_by
from reap2gguf.pruning.view import PrunedView
from reap2gguf.repairing.stored import new_tensors

if TYPE_CHECKING:
    from reap2gguf.artifacts.observations import LayerObservation
    from reap2gguf.artifacts.texts import Row
    from reap2gguf.checkpoint.weights import Weights
    from reap2gguf.merging.folder import MergedLayer, MergeFolder
    from reap2gguf.models.contract import MoeModel
    from reap2gguf.models.description import Projection
    from reap2gguf.observing.compute.experts import RoutedPairs
    from reap2gguf.observing.loader import Target
    from reap2gguf.observing.observer import Arrays
    from reap2gguf.options import ComputeOptions
    from reap2gguf.progress import Progress
    from reap2gguf.pruning.select import Kept
    from reap2gguf.repairing.features import Map

_TITLE = "Merging experts"


def merge(
    weights: Weights,
    model: MoeModel,
    rows: Sequence[Row],
    spec: MergeSpec,
    folder: MergeFolder,
    options: ComputeOptions,
    progress: Progress,
) -> dict[int, MergedLayer]:
    """Merge the experts of every layer by what they do on `rows`; the tensors are in `folder`.

    Raises UsageError for too little memory or several processes, UnsupportedModelError for experts
    that it is not defined for, and what a sweep raises.
    """
    check_mergeable(model, spec.method)
    layers = sorted(model.facts.moe_layers)
    if all(folder.load(layer) is not None for layer in layers):
        return folder.load_all(layers)
    device, dtype = resolve_device(options)
    if device.type == "cuda":
        torch.set_num_threads(options.threads)  # on a CPU the crew sets them
    limit_gpu_memory(device, options.memory)
    threads = SharedThreads(device, options.threads)
    settings = dtype, device, options.threads, None, threads
    freeing = frees_at_once() if device.type == "cpu" and options.memory else nullcontext()
    first_ones = dict.fromkeys(model.facts.moe_layers, tuple(range(spec.target.n_kept)))
    narrow = PrunedView(weights, model, first_ones)
    with (
        gpu_errors(),
        closing(threads),
        closing(StreamedDecoder(weights, model, *settings)) as decoder,
        closing(StreamedDecoder(narrow, narrow.model, *settings)) as fewer,
        freeing,
    ):
        observer = _Observer(model, _Work(weights, model, spec, folder, fewer, threads))
        observer.use(device)
        context = SweepContext(decoder, observer, Ranks(), progress)
        plan = plan_merge(context, rows, options, spec.method, spec.group_size)
        with open_sweep(context, plan, options, _MergeRun) as run:
            assert observer.work is not None
            run.work = observer.work
            for line in opening_notes(context, plan.budget, run.spool.n_bytes):
                progress.note(line)
            run.prefetch(run.plan.first_layer)
            run.all_layers(_TITLE)
    return folder.load_all(layers)


@dataclass(frozen=True)
class _Work:
    """What a merge needs beside its sweep."""

    weights: Weights
    model: MoeModel
    spec: MergeSpec
    folder: MergeFolder
    fewer: StreamedDecoder  # whose layers have as many experts as stay
    threads: SharedThreads

    def kept_map(self, layer: int, kept: tuple[int, ...]) -> Kept:
        """The experts of one layer that stay, and any of the others."""
        first_ones = tuple(range(len(kept)))
        return {**dict.fromkeys(self.model.facts.moe_layers, first_ones), layer: kept}


class _Observer(SaliencyObserver):
    """Watches an MTP block, and keeps padding from the experts of other layers."""

    def __init__(self, model: MoeModel, work: _Work | None = None) -> None:
        super().__init__(model)
        self.work = work

    def attach(self, index: int, layer: torch.nn.Module) -> None:
        if index == self._model.facts.mtp_layer:
            super().attach(index, layer)
        elif index in self._model.facts.moe_layers:
            watch(layer.get_submodule(self._model.experts_path(index)), self)

    def see(self, pairs: RoutedPairs) -> None:
        if len(self._counts):
            super().see(pairs)

    def sums(self) -> Iterable[Tensor]:
        return super().sums() if len(self._counts) else ()

    def peaks(self) -> Iterable[Tensor]:
        return super().peaks() if len(self._counts) else ()

    def finish(self, index: int, sums: Sequence[Tensor], peaks: Sequence[Tensor]) -> None:
        """Keep the experts of an MTP block that score best; its file has no tensors."""
        work = self.work
        if index != self._model.facts.mtp_layer or work is None:
            return
        super().finish(index, sums, peaks)
        kept = _best_of_block(work.spec, self._model, index, self.layers[index])
        groups = tuple(Group((expert,), (1.0,)) for expert in kept)
        work.folder.save(index, LayerMerge(groups, int(sums[0].sum())), {})

    def finished_sums(self) -> Arrays:
        """The layers that a saved state of hidden states depends on."""
        assert self.work is not None
        folder, layers = self.work.folder, merged_layers(self._model)
        done = [layer for layer in layers if folder.file(layer).is_file()]
        return {"done": np.array(done, dtype=np.int64)}

    def restore(self, arrays: Arrays) -> None:
        assert self.work is not None
        for layer in arrays["done"].tolist():
            if self.work.folder.load(layer) is None:
                raise ValueError(f"the file of layer {layer} is missing")


def _best_of_block(
    spec: MergeSpec, model: MoeModel, layer: int, seen: LayerObservation
) -> tuple[int, ...]:
    scores = dict.fromkeys(model.facts.moe_layers, scores_by(OBSERVED["reap"], seen))
    return keep_best(scores, spec.target, model.facts, spec.protected)[layer]


class _MergeRun(Sweep):
    """A merge under way: the rows' hidden states in the model that is merged so far."""

    work: _Work

    def _begin_first(self) -> None:
        """The first layer is read once the work is known."""

    def _load(self, index: int) -> torch.nn.Module:
        """The layer that the rows run through; it is merged first, if it is not yet."""
        work, layer = self.work, self.decoder.load_layer(index)
        if index not in merged_layers(work.model):
            return layer
        made = work.folder.load(index)
        if made is None:
            try:
                self._merge(index, layer)
            except ObservationError as error:
                raise ObservationError(f"layer {index}: {error}") from error
            made = work.folder.load(index)
            assert made is not None
        return self._merged(index, made.facts.kept) if work.spec.is_sequential else layer

    @property
    def _each(self) -> Map:
        crew = self.decoder.crew
        return map if crew is None else crew.in_order

    def _merge(self, index: int, layer: torch.nn.Module) -> None:
        """Find the groups of a layer and write its file."""
        work, facts, each = self.work, self.work.model.facts, self._each
        run, option = (self.decoder, index, layer, self.batches, self.spool), work.spec.method
        aligned: Captured | None = None
        if work.spec.method == "ream":
            sums = ReamSums.zeros(self._router(index), facts.expert_width)
            aligned = capture(*run, sums, each, f"--method {option}")
            found = ream_merge(work.spec, facts, index, aligned, sums)
        else:
            ttm = TtmSums.zeros(facts.n_experts, self.decoder.device)
            seen = capture(*run, ttm, each, f"--method {option}")
            found = hc_merge(work.spec, facts, index, seen, ttm)
        read = partial(self._matrices, index)
        matrices = merged_matrices(found.groups, read, aligned, each)
        view = PrunedView(work.weights, work.model, work.kept_map(index, found.kept))
        work.folder.save(index, found, new_tensors(view, index, self._by_projection(matrices)))
        self.progress.note(merge_text(index, found))

    def _projections(self, index: int) -> Sequence[Projection]:
        """The projections of an expert; down is the last."""
        names = self.work.model.expert_tensors(index, self.work.weights.tensors)
        return (*(name for name in names if name != "down"), "down")

    def _by_projection(
        self, matrices: Mapping[int, Sequence[Tensor]]
    ) -> Mapping[Projection, Mapping[int, Tensor]]:
        names = self._projections(merged_layers(self.work.model)[0])
        return {
            name: {expert: own[number].float().cpu() for expert, own in matrices.items()}
            for number, name in enumerate(names)
        }

    def _matrices(self, index: int, expert: int) -> Sequence[Tensor]:
        """An expert's stored matrices, float32, where the layer is computed; down is the last."""
        weights, model = self.work.weights, self.work.model
        tensors = model.expert_tensors(index, weights.tensors)
        names = self._projections(index)
        targets: dict[str, Target] = {
            name: expert_target(weights, tensors[name], expert, torch.float32) for name in names
        }
        loader, key = self.decoder.loader, f"expert {expert} of layer {index}"
        loader.ask(key, targets)
        found = loader.take(key)
        return [found[name] for name in names]

    def _router(self, index: int) -> Tensor:
        """The rows (E, H) float32 that make the router's logits."""
        weights, model = self.work.weights, self.work.model
        shape = model.facts.n_experts, model.facts.hidden_size
        for name, stored in weights.tensors.items():
            if stored.shape != shape or not isinstance(role := model.role(name), Router):
                continue
            if role.layer == index:
                return torch.from_numpy(weights.read_float32(name)).to(self.decoder.device)
        raise UnsupportedModelError(
            f"layer {index}: no router with a row for each expert, by which --method ream compares "
            "experts; choose another --method"
        )

    def _merged(self, index: int, kept: tuple[int, ...]) -> torch.nn.Module:
        """The layer with the experts that stay, and with their new weights."""
        decoder, fewer = self.decoder, self.work.fewer
        tensors, shapes = decoder.layer_tensors(index), fewer.layer_shapes(index)
        layer = fewer.place_layer(index, narrowed(tensors, shapes, kept, in_place=True))
        decoder.drop_layer(index)
        self._put_in_place(index, kept, layer)
        decoder.replace_layer(index, layer)
        return layer

    @torch.inference_mode()
    def _put_in_place(self, index: int, kept: tuple[int, ...], layer: torch.nn.Module) -> None:
        """Give a layer the weights in its file, if it has any."""
        work = self.work
        with work.folder.open([index]) as stored:
            if not stored.tensors:
                return
            pruned = PrunedView(work.weights, work.model, work.kept_map(index, kept))
            view = ReplacedView(pruned, stored)
            targets = {
                name: target
                for name, target in work.fewer.targets(index).items()
                if any(run.stored in view.replaced for run in target.runs)
            }
            loader = WeightLoader(view, self.decoder.device, work.threads.readers)
            loader.ask("merged", targets)
            for name, values in loader.take("merged").items():
                layer.get_parameter(name).copy_(values)


def merge_text(layer: int, found: LayerMerge) -> str:
    """What a layer's merge came to, in one line."""
    sizes = sorted((len(group.members) for group in found.groups if group.is_merged), reverse=True)
    total = sum(len(group.members) for group in found.groups)
    largest = f"{len(sizes)} of them merged, from {', '.join(map(str, sizes))} experts"
    return f"layer {layer}: {total} experts -> {len(found.groups)}, {largest}"
