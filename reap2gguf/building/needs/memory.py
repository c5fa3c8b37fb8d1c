"""Memory of a build: batches, and where hidden states wait, as the sweep itself decides."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING

from reap2gguf.building.needs.scoring import (
    CHUNK,
    WEIGHED_TOKENS,
    chosen_tokens,
    weighed_variants,
)
from reap2gguf.checkpoint.safetensors_header import StoredTensor
from reap2gguf.errors import UsageError
from reap2gguf.evaluating.head_cut import Cut, HeadShape
from reap2gguf.machine import processes
from reap2gguf.merging.room import merge_need
from reap2gguf.observing.budget import (
    CONTEXT_BYTES,
    Budget,
    Kind,
    Memory,
    Need,
    copies_experts,
    cpu_memory,
    fit,
    gpu_memory,
    held_bytes,
    importance_bytes,
    layer_bytes,
)
from reap2gguf.pruning.write import HELD_BYTES
from reap2gguf.repairing.gram_size import WAYS
from reap2gguf.repairing.ways import best_way, layer_size, repair_need
from reap2gguf.verifying.memory import COMPARING_BYTES, comparing_bytes

if TYPE_CHECKING:
    from reap2gguf.building.needs.amount import Amount
    from reap2gguf.building.needs.machine import Machine
    from reap2gguf.building.needs.sizes import Sizes
    from reap2gguf.building.plan import Plan

BASE_BYTES = 650 * 2**20  # Python, torch, transformers
_BESIDE_A_GPU = 11 * 2**28  # the same with CUDA's libraries, and buffers for weights
_BYTES_PER_VALUE = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class SweepNeeds:
    """What the calibration passes take, or an evaluation."""

    budget: Budget | None  # None: they do not fit
    problem: str  # why not
    device_bytes: int  # of the GPU, or of RAM on a CPU
    host_bytes: int  # RAM
    hidden_bytes: int  # hidden states of all rows: of the longer pass, of all variants
    itemsize: int

    @property
    def spool_bytes(self) -> int:
        """Hidden states that wait on the disk."""
        return self.hidden_bytes if self.budget and self.budget.spool == "disk" else 0


def sweep_needs(plan: Plan, sizes: Sizes, amount: Amount, machine: Machine) -> SweepNeeds:
    """What both passes take on a machine: what `fit`, which the sweep calls, makes of it."""
    n_here = processes().on_machine
    kind = _kind(plan, sizes, machine, n_here)
    kind = replace(kind, sums=importance_bytes(plan.model))
    need = _need(plan, sizes, amount, kind)
    return _fitted(plan, need, kind, machine, n_here)


def evaluation_needs(
    plan: Plan, sizes: Sizes, n_chunks: int, machine: Machine
) -> SweepNeeds | None:
    """What the stage takes that measures quality, with this many chunks; None if it is left out.

    All variants share the memory as in `evaluating/engine.py`: the largest layer may be one of a
    GGUF file, whose weights are float32 there. One process computes it.
    """
    if not n_chunks:
        return None
    kind = _kind(plan, sizes, machine, 1)
    tensors, model = plan.checkpoint.tensors, plan.model
    embedding = tensors[model.embedding_name].n_elements * kind.itemsize
    length = min(CHUNK, model.facts.context_length)
    n_positions = n_chunks * length * plan.n_variants
    sources = sizes.layers(kind.itemsize, kind.on_gpu)
    trunk = {n: sources[n] for n in range(model.facts.n_layers) if n in sources}
    need = kind.need(trunk, embedding, n_positions, length)
    quantized = {
        name: StoredTensor(name, "F32", tensor.shape)
        for name, tensor in plan.pruned.tensors.items()
    }
    files = layer_bytes(plan.pruned.model, quantized, kind.itemsize, kind.on_gpu)
    need = replace(need, layer=max(need.layer, *files.values()))
    heads = HeadShape(
        model.facts.vocab_size,
        kind.hidden_bytes,
        1 + len(plan.recipes),  # the pruned model has the source's
        plan.n_variants,
        kind.n_threads,
    )
    return _fitted(plan, need, kind, machine, 1, heads)


def choosing_needs(plan: Plan, sizes: Sizes, amount: Amount, machine: Machine) -> SweepNeeds | None:
    """What the stage takes that chooses a method, or weighs numbers of experts: the larger one.

    None if both were named. All candidates are views of the source, which share its layers and its
    head.
    """
    if not plan.chooses and not plan.weighs:
        return None
    n_here = processes().on_machine
    asked = [(1 + len(plan.candidates), chosen_tokens(amount))] if plan.chooses else []
    if plan.weighs:
        asked.append((len(weighed_variants(plan)), WEIGHED_TOKENS))
    n_variants, n_tokens = max(asked, key=prod)
    kind = _kind(plan, sizes, machine, n_here)
    embedding = plan.checkpoint.tensors[plan.model.embedding_name].n_elements * kind.itemsize
    layers = sizes.layers(kind.itemsize, kind.on_gpu)
    trunk = {n: layers[n] for n in range(plan.model.facts.n_layers) if n in layers}
    n_positions = -(-n_tokens * n_variants // processes().size)
    need = kind.need(trunk, embedding, n_positions, max(amount.longest_row, CHUNK))
    # as in `evaluating/engine.py`: a third layer, if several views are made of one
    need = replace(need, layer=int(1.5 * need.layer) if n_variants > 2 else need.layer)
    heads = HeadShape(plan.model.facts.vocab_size, kind.hidden_bytes, 1, n_variants, kind.n_threads)
    return _fitted(plan, need, kind, machine, n_here, heads)


def change_needs(plan: Plan, sizes: Sizes, amount: Amount, machine: Machine) -> SweepNeeds | None:
    """What a repair or a merge takes; None if the build has neither. One process computes it."""
    if plan.merges:
        return _merge_needs(plan, sizes, amount, machine)
    return _repair_needs(plan, sizes, amount, machine) if plan.repairs else None


def _merge_needs(plan: Plan, sizes: Sizes, amount: Amount, machine: Machine) -> SweepNeeds:
    """Of a pass whose layers are the source's, with what experts are compared by."""
    kind = _kind(plan, sizes, machine, 1)
    layers = sizes.layers(kind.itemsize, kind.on_gpu)
    embedding = plan.checkpoint.tensors[plan.model.embedding_name].n_elements * kind.itemsize
    need = kind.need(layers, embedding, amount.n_tokens, amount.longest_row)
    how = plan.method, plan.group_size, kind.n_threads, kind.itemsize
    return _fitted(plan, merge_need(need, plan.model.facts, *how), kind, machine, 1)


def _repair_needs(plan: Plan, sizes: Sizes, amount: Amount, machine: Machine) -> SweepNeeds:
    """Of a pass that has both sides of a layer and its normal equations."""
    kind, on_gpu = _kind(plan, sizes, machine, 1), machine.device == "cuda"
    facts, layers = plan.pruned.model.facts, sizes.layers(kind.itemsize, on_gpu)
    model, tensors = plan.pruned.model, plan.pruned.tensors
    kept = layer_bytes(model, tensors, kind.itemsize, on_gpu)
    embedding = plan.checkpoint.tensors[plan.model.embedding_name].n_elements * kind.itemsize
    trunk = {n: kept[n] for n in range(facts.n_layers) if n in kept}
    need = kind.need(trunk, embedding, amount.n_tokens, amount.longest_row)
    need = repair_need(need, max(layers[n] for n in trunk))
    ways = ("",) if plan.repair == "scale" else WAYS
    memory = _memory(plan, machine, 1)
    try:
        way = best_way(
            need,
            lambda name: layer_size(facts, name, on_gpu),
            machine.device,
            memory,
            plan.options.compute.spool,
            ways,
        )
    except UsageError as error:
        return SweepNeeds(None, str(error), 0, 0, 0, kind.itemsize)
    held, hidden = held_bytes(way.whole_need, way.budget), need.n_positions * need.hidden
    if not on_gpu:
        ram = BASE_BYTES + held
        return SweepNeeds(way.budget, "", ram, ram, hidden, kind.itemsize)
    ram = _BESIDE_A_GPU + way.size.host + (hidden if way.budget.spool == "host" else 0)
    return SweepNeeds(way.budget, "", CONTEXT_BYTES + held, ram, hidden, kind.itemsize)


def _kind(plan: Plan, sizes: Sizes, machine: Machine, n_here: int) -> Kind:
    """How a machine computes the source; `n_here` processes share its threads."""
    compute, on_gpu = plan.options.compute, machine.device == "cuda"
    dtype = compute.dtype if compute.dtype != "auto" else ("bfloat16" if on_gpu else "float32")
    itemsize = _BYTES_PER_VALUE[dtype]
    return Kind(
        plan.model,
        itemsize,
        on_gpu,
        sizes.has_linear_attention,
        max(1, compute.threads // n_here),
        copies_experts=copies_experts(plan.model, plan.checkpoint.tensors, itemsize, on_gpu),
    )


def _fitted(
    plan: Plan,
    need: Need,
    kind: Kind,
    machine: Machine,
    n_here: int,
    heads: HeadShape | None = None,
) -> SweepNeeds:
    """What `fit` makes of a need in each of `n_here` processes; heads follow the layers."""
    on_gpu, hidden = kind.on_gpu, need.n_positions * need.hidden
    memory = _memory(plan, machine, n_here)
    try:
        budget = fit(need, machine.device, memory, plan.options.compute.spool)
    except UsageError as error:
        return SweepNeeds(None, str(error), 0, 0, hidden, kind.itemsize)
    held = held_bytes(need, budget)
    if heads is not None:
        # a batch is of one variant
        most = need.n_positions // heads.n_variants
        held = held_bytes(need, replace(budget, batch_tokens=min(budget.batch_tokens, most)))
        on_device = hidden if budget.spool == "device" else 0
        cut = Cut.into(memory.usable - on_device, heads, machine.device)
        held = max(held, on_device + cut.n_bytes(heads))
    if not on_gpu:
        return SweepNeeds(budget, "", BASE_BYTES + held, BASE_BYTES + held, hidden, kind.itemsize)
    on_host = hidden if budget.spool == "host" else 0
    return SweepNeeds(
        budget, "", CONTEXT_BYTES + held, _BESIDE_A_GPU + on_host, hidden, kind.itemsize
    )


def _memory(plan: Plan, machine: Machine, n_here: int) -> Memory:
    """What each of `n_here` processes may take."""
    limit, host = plan.options.compute.memory, machine.memory_free_bytes // n_here
    if machine.device == "cpu":
        return cpu_memory(host, limit, BASE_BYTES, n_here)
    assert machine.gpu is not None
    # CUDA's libraries take theirs before a sweep asks
    free = machine.gpu.free_bytes - CONTEXT_BYTES
    return gpu_memory(free, machine.gpu.n_bytes, host, limit)


def peak_ram(
    plan: Plan, machine: Machine, sweeps: SweepNeeds, export: int, verifies_on_gpu: bool
) -> int:
    """The most RAM of a build whose export holds `export` bytes.

    The safetensors are verified beside the export, and the GGUF files after it, in its place.

    Stages run beside a calibration pass only as far as the memory is free, or as --memory allows
    on a CPU, else after it.
    """
    comparing = comparing_bytes(machine.cores, verifies_on_gpu) - export
    verifying = max(COMPARING_BYTES * machine.cores, comparing)
    beside = HELD_BYTES * plan.writes_hf + export + verifying
    base = BASE_BYTES if machine.device == "cpu" else _BESIDE_A_GPU
    alone = max(sweeps.host_bytes, base + beside)
    if machine.cores == 1:
        return alone
    limit = plan.options.compute.memory if machine.device == "cpu" else None
    room = machine.memory_free_bytes if limit is None else min(limit, machine.memory_free_bytes)
    return max(alone, min(sweeps.host_bytes + beside, room))


def _need(plan: Plan, sizes: Sizes, amount: Amount, kind: Kind) -> Need:
    """Of the longer pass; layers are those of the unpruned model."""
    layers = sizes.layers(kind.itemsize, kind.on_gpu)
    embedding = plan.checkpoint.tensors[plan.model.embedding_name].n_elements * kind.itemsize
    makes_passes = plan.observes or plan.merges or plan.repairs
    observed = amount.n_tokens if makes_passes else 0
    positions = max(observed, amount.n_chunk_tokens) + amount.probe_tokens
    return kind.need(layers, embedding, -(-positions // processes().size), amount.longest_row)
