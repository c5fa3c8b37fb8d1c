"""The time of each stage of a build on a machine, from counts of what the stage does.

Rates of processors and disks are measured (`speed.py`). Those of a GPU come from an H100
(bench/RESULTS.md) and are scaled to others by the figures of their data sheets. bench/plan.py
compares the result with real builds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil, prod
from typing import TYPE_CHECKING

from gguf import GGMLQuantizationType

from reap2gguf.building.needs.file_seconds import (
    MEMORY_BYTES,
    export_seconds,
    verify_seconds,
)
from reap2gguf.building.needs.scoring import CHUNK, WEIGHED_TOKENS, chosen_tokens, planned_chunks
from reap2gguf.building.needs.scoring import weighed_variants as _weighed_variants
from reap2gguf.fitting.target import MEASURED, PROBE_TOKENS
from reap2gguf.merging.limits import merged_layers
from reap2gguf.observing.linear_attention import installed_version
from reap2gguf.quantizing.kernels.gpu_kernels import FORMS

if TYPE_CHECKING:
    from reap2gguf.building.needs.amount import Amount
    from reap2gguf.building.needs.disk import DiskNeeds
    from reap2gguf.building.needs.sizes import Sizes
    from reap2gguf.building.needs.speed import Speed
    from reap2gguf.building.plan import Plan
    from reap2gguf.building.sized import SizedFile
    from reap2gguf.quantizing.resolve import ResolvedRecipe

    Recipes = Sequence[ResolvedRecipe]

STAGES = (
    *("start", "texts", "observe", "weigh", "choose", "merge", "repair", "prune"),
    *("imatrix", "fit", "export", "verify", "evaluate", "finish"),
)

# Seconds on the reference machine of speed.py, of Python code where nothing else is said.
_IMPORTS = 2.1  # torch, transformers and the rest
_PER_TENSOR = 25e-6  # to read headers and plan
_FIRST_PASS = 1.2  # builds the model, and loads what computes
_PASS = 0.4
_GIVEN = 0.1  # to take over an importance matrix
_FINISH = 1.8  # pictures, cards, manifest and names; then the program ends
_GPU_START = 2.5  # CUDA, and kernels that are compiled
_TOKENIZE = 1.2e-6  # per token of local text
_RENDER = 5e-6  # per token of chat samples, read from the Hub
_HELD_BACK = 0.1  # of the memory that is free: what Linux does not write to a disk at once
_DEQUANTIZE = 0.5e-9  # per weight and core
_COMPARED = 8e-9  # to read a sampled weight of one type back, and to add its error up
_CHOOSING = 1.0  # types for all tensors
_PARALLEL = 0.85  # of the threads, in a pass on a CPU and in an export

# A pass on a CPU, per position and layer.
_EFFICIENCY = 1.0  # of matrix products, against small ones that fit the caches
_AROUND = 40e-9  # seconds of one core per column of the hidden state: norms, routing, copies
_DELTANET = 4.8  # the same of transformers' DeltaNet code, in multiples of `_AROUND`
_SERIAL = 2e-6  # seconds that no other thread can share
# A pass for the importance matrix, relative to one that observes: more sums, of larger arrays.
_IMATRIX, _IMATRIX_ON_GPU = 1.05, 1.12

# An H100: floating-point operations per second that a pass reaches, and against others.
_H100_FLOPS = 3.2e14
_DELTANET_SHARE = 0.7  # of that, with flash-linear-attention
_REFERENCE_SHARE = 0.35  # with transformers' own code
_H100_FLOAT32 = 3.5e13  # the same in float32
# A repair: passes over all layers in whole, and the strengths of the ridge that are tried.
_REPAIR_PASSES, _ALPHAS = 2.5, 4
DOWNLOAD_BYTES = 1e8  # per second, from the Hub, where nothing is known of the connection


@dataclass(frozen=True)
class Host:
    """What a build computes with: processor rates, threads, and how fast a GPU is, if any."""

    speed: Speed
    cores: int
    gpu_factor: float | None = None  # time of a pass on it, an H100's being 1; None: CPU
    page_cache: int = 0  # bytes of files that stay in memory
    download_bytes: float = DOWNLOAD_BYTES  # per second

    @property
    def parallel(self) -> float:
        """Threads that work at a time, on average."""
        return 1 + (self.cores - 1) * _PARALLEL


def stage_seconds(
    plan: Plan,
    sizes: Sizes,
    amount: Amount,
    disk: DiskNeeds,
    host: Host,
    recipes: Recipes,
    pays_on_gpu: bool,
) -> dict[str, float]:
    """Seconds of every stage of a build from scratch; 0 for a stage that it does not have.

    `recipes` are those of the plan whose files are made; `pays_on_gpu`: a GPU, where there is one,
    quantizes them.
    """
    python = host.speed.python
    waiting = _waiting(plan, host, is_first=not plan.observes)
    begun = python * _FIRST_PASS
    gpu_factor = host.gpu_factor if pays_on_gpu else None
    found = {
        "start": python * (_IMPORTS + 2 * _PER_TENSOR * len(plan.checkpoint.tensors)),
        "texts": _texts(plan, amount, host),
        "observe": _observe(plan, sizes, amount, disk, host),
        "weigh": _weigh(plan, sizes, amount, host),
        "choose": _choose(plan, sizes, amount, host),
        "merge": max(_merge(plan, sizes, amount, host), waiting) + begun if plan.merges else 0.0,
        "repair": max(_repair(plan, sizes, amount, host), waiting) + begun if plan.repairs else 0.0,
        "prune": _prune(plan, host),
        "imatrix": _imatrix(plan, sizes, amount, disk, host, waiting),
        "fit": _fitted(plan, sizes, amount, host),
        "export": export_seconds(recipes, host, gpu_factor),
        "verify": verify_seconds(plan, recipes, sizes, disk, host, gpu_factor),
        "evaluate": _evaluate(plan, sizes, amount, recipes, host),
        "finish": python * _FINISH + disk.gguf / host.speed.hash_bytes / host.parallel * 0.1,
    }
    return {name: found[name] for name in STAGES}


def critical_path(stages: Mapping[str, float], host: Host, waits: bool = False) -> float:
    """Seconds of a build whose stages take these: fewer than their sum, since some overlap.

    Prune and export share the disk and the processor. A sweep on a GPU needs neither, so the longer
    of the two counts. A sweep on a CPU leaves nothing to an export that computes; the safetensors
    are written meanwhile. An export whose types are chosen after a sweep waits for it, and so does
    one (`waits`) with a recipe that asks how much the importance matrix saw. With one thread
    nothing overlaps.
    """
    prune, imatrix, export = (stages[name] for name in ("prune", "imatrix", "export"))
    alone = sum(stages.values()) - prune - imatrix - export
    if host.cores == 1:
        return alone + prune + imatrix + export
    if host.gpu_factor is not None and not stages["fit"] and not waits:
        return alone + max(imatrix, prune + export)
    return alone + max(imatrix, prune) + export


def _waiting(plan: Plan, host: Host, is_first: bool) -> float:
    """Seconds that a pass waits for weights.

    The first one reads them from the disk, or the Hub; later ones find what stays in memory.
    """
    if not is_first:
        return _read_seconds(plan.pruned.n_bytes, host)
    source = plan.checkpoint
    reading = _read_seconds(source.n_stored_bytes, host, is_first=True)
    return max(reading, source.unfetched_bytes / host.download_bytes)


def _texts(plan: Plan, amount: Amount, host: Host) -> float:
    if not plan.reads_texts:
        return 0.0
    on_hub = not all(one.is_local for one in plan.calibration.components)
    per_token = _RENDER if on_hub else _TOKENIZE
    n_tokens = amount.n_tokens + amount.n_chunk_tokens
    return host.speed.python * (0.05 + per_token * n_tokens) + (5.0 if on_hub else 0.0)


def _read_seconds(n_bytes: int, host: Host, is_first: bool = False) -> float:
    """To read weights: from the disk, or from memory where they were read before."""
    in_memory = 0 if is_first else min(n_bytes, host.page_cache)
    return (n_bytes - in_memory) / host.speed.read_bytes + in_memory / MEMORY_BYTES


def _pass(plan: Plan, sizes: Sizes, n_tokens: int, amount: Amount, host: Host) -> float:
    """Seconds of a calibration pass, its start and the reading of weights aside."""
    facts = plan.model.facts
    n_positions = n_tokens + amount.probe_tokens
    flops = n_positions * (2 * sizes.in_layers + _attention(plan, amount))
    is_linear = sizes.has_linear_attention
    if host.gpu_factor is not None:
        share = 1.0
        if is_linear:
            share = _REFERENCE_SHARE if installed_version() is None else _DELTANET_SHARE
        return flops / (_H100_FLOPS * share) * host.gpu_factor
    positions = n_positions * facts.n_blocks
    around = _AROUND * facts.hidden_size * (_DELTANET if is_linear else 1.0)
    shared = flops / (_EFFICIENCY * host.speed.flops) + positions * around
    return shared / host.parallel + positions * _SERIAL * host.speed.python


def _spooling(plan: Plan, n_tokens: int, amount: Amount, disk: DiskNeeds, host: Host) -> float:
    """Seconds in which a disk writes the hidden states of a pass, more than memory holds back."""
    if disk.spool <= _HELD_BACK * host.page_cache:
        return 0.0
    share = n_tokens / max(amount.n_tokens, amount.n_chunk_tokens, 1)
    return (
        share * disk.spool * ceil(plan.model.facts.n_blocks / disk.depth) / host.speed.write_bytes
    )


def _observe(plan: Plan, sizes: Sizes, amount: Amount, disk: DiskNeeds, host: Host) -> float:
    """The pass that observes the experts; it is the first one."""
    if not plan.observes:
        return 0.0
    passing = _pass(plan, sizes, amount.n_tokens, amount, host)
    if plan.takes_sums:
        passing *= _IMATRIX if host.gpu_factor is None else _IMATRIX_ON_GPU
    spooling = _spooling(plan, amount.n_tokens, amount, disk, host)
    waiting = _waiting(plan, host, is_first=True)
    starting = host.speed.python * _FIRST_PASS + (0.0 if host.gpu_factor is None else _GPU_START)
    return max(passing, waiting, spooling) + starting


def _prune(plan: Plan, host: Host) -> float:
    """The safetensors, which a later stage reads again meanwhile."""
    if not plan.writes_hf:
        return 0.0
    copied = plan.hf_bytes
    return copied / host.speed.write_bytes + _read_seconds(copied, host) / 2


def _imatrix(
    plan: Plan, sizes: Sizes, amount: Amount, disk: DiskNeeds, host: Host, waiting: float
) -> float:
    """The pass for the importance matrix, which may wait for weights; or a given one."""
    if not plan.computes_imatrix:
        return host.speed.python * _GIVEN
    passing = _pass(plan, sizes, amount.n_chunk_tokens, amount, host)
    passing *= _IMATRIX if host.gpu_factor is None else _IMATRIX_ON_GPU
    spooling = _spooling(plan, amount.n_chunk_tokens, amount, disk, host)
    return max(passing, waiting, spooling) + host.speed.python * _PASS


def _repair(plan: Plan, sizes: Sizes, amount: Amount, host: Host) -> float:
    """Two passes over the pruned model and one over the source's experts, and the regressions."""
    passing = _REPAIR_PASSES * _pass(plan, sizes, amount.n_tokens, amount, host)
    if plan.repair == "scale":
        return passing
    facts = plan.model.facts
    n = plan.target.n_kept * facts.expert_width
    gram = n * n * amount.n_tokens  # of a triangle
    solving = _ALPHAS * (n**3 // 3 + 4 * n * n * facts.expert_io_width)
    n_layers = len(facts.moe_layers) - facts.has_mtp
    if host.gpu_factor is not None:
        each = (gram / _H100_FLOPS + solving / _H100_FLOAT32) * host.gpu_factor
    else:  # in float64
        each = 2 * (gram + solving) / (_EFFICIENCY * host.speed.flops) / host.parallel
    return passing + n_layers * each


def _merge(plan: Plan, sizes: Sizes, amount: Amount, host: Host) -> float:
    """Two passes, every expert on every token, and REAM's covariances and eigenvectors."""
    facts, n_layers = plan.model.facts, len(merged_layers(plan.model))
    is_ream = plan.method == "ream"
    passing = (1 + is_ream) * _pass(plan, sizes, amount.n_tokens, amount, host)
    matrix = facts.expert_io_width * facts.expert_width
    dense = 2 * (2 if is_ream else 3) * matrix * facts.n_experts * amount.n_tokens
    size = 3 * facts.expert_io_width
    aligning = facts.n_experts * facts.expert_width * size**2 + 6 * size**3 if is_ream else 0
    if host.gpu_factor is not None:
        each = (dense / _H100_FLOPS + aligning / _H100_FLOAT32) * host.gpu_factor
    else:  # the latter in float64
        each = (dense + 2 * aligning) / (_EFFICIENCY * host.speed.flops) / host.parallel
    return passing + n_layers * each


def _attention(plan: Plan, amount: Amount) -> int:
    """Operations of a position in all layers: scores and values, half of them masked."""
    facts = plan.model.facts
    return 2 * amount.mean_row * facts.n_heads * facts.head_dim * facts.n_blocks


def _evaluate(plan: Plan, sizes: Sizes, amount: Amount, recipes: Recipes, host: Host) -> float:
    """All variants through all layers, and the logits of all scored tokens."""
    n_tokens = CHUNK * planned_chunks(plan, amount)
    if not n_tokens:
        return 0.0
    python = host.speed.python
    n_variants = 1 + plan.writes_hf + len(recipes)
    passing = _scoring(plan, sizes, amount, n_variants, n_tokens, host)
    n_weights = sum(prod(entry.tensor.shape) for recipe in recipes for entry in recipe.table)
    reading = (
        _read_seconds(plan.checkpoint.n_stored_bytes, host)
        + _DEQUANTIZE * n_weights / host.parallel
    )
    return max(passing, reading) + python * n_variants * _PASS


def _choose(plan: Plan, sizes: Sizes, amount: Amount, host: Host) -> float:
    """All candidates through all layers, as views of a source that is read once."""
    if not plan.chooses:
        return 0.0
    n_variants = 1 + len(plan.candidates)
    passing = _scoring(plan, sizes, amount, n_variants, chosen_tokens(amount), host)
    reading = _read_seconds(plan.checkpoint.n_bytes, host)
    return max(passing, reading) + host.speed.python * n_variants * _PASS


def _weigh(plan: Plan, sizes: Sizes, amount: Amount, host: Host) -> float:
    """All numbers of experts through all layers, and the types of each of them."""
    if not plan.weighs or plan.sized is None:
        return 0.0
    n_variants = len(_weighed_variants(plan))
    passing = _scoring(plan, sizes, amount, n_variants, WEIGHED_TOKENS, host)
    passing = max(passing, _read_seconds(plan.checkpoint.n_bytes, host))
    fitting = len(plan.counts) * _fit(plan.sized, host)
    is_measured = plan.options.weigh_sensitivity == MEASURED
    probing = _probe(plan, sizes, amount, host) if is_measured else 0.0
    return passing + host.speed.python * n_variants * _PASS + fitting + probing


def _probe(plan: Plan, sizes: Sizes, amount: Amount, host: Host) -> float:
    """All probes through all layers; the weights that they change are quantized on a processor."""
    n_probes = 0 if plan.sized is None else plan.sized.n_probes
    if not n_probes:
        return 0.0
    passing = _scoring(plan, sizes, amount, 1 + n_probes, PROBE_TOKENS, host)
    making = host.speed.quantize_seconds(GGMLQuantizationType.Q3_K, plan.n_parameters)
    return passing + making / host.parallel + host.speed.python * (1 + n_probes) * _PASS


def _scoring(
    plan: Plan, sizes: Sizes, amount: Amount, n_variants: int, n_tokens: int, host: Host
) -> float:
    """Seconds of variants through all layers, and of the logits of half of their tokens."""
    facts, scored = plan.model.facts, replace(amount, probe_tokens=0)
    passing = n_variants * _pass(plan, sizes, n_tokens, scored, host)
    flops = n_variants * n_tokens * facts.vocab_size * facts.hidden_size
    if host.gpu_factor is not None:
        return passing + flops / _H100_FLOPS * host.gpu_factor
    return passing + flops / (_EFFICIENCY * host.speed.flops) / host.parallel


def _fitted(plan: Plan, sizes: Sizes, amount: Amount, host: Host) -> float:
    """The types of a file for a size, and how much an error in each tensor counts."""
    if plan.sized is None:
        return 0.0
    return _fit(plan.sized, host) + _probe(plan, sizes, amount, host)


def _fit(sized: SizedFile, host: Host) -> float:
    """Sampled rows of each tensor, quantized to all types and compared, and then the choice."""
    seconds = tables = 0.0
    for kind, n_values in sized.sampled.items():
        seconds += n_values * _COMPARED
        if host.gpu_factor is None or kind not in FORMS:
            seconds += host.speed.quantize_seconds(kind, n_values)
        tables += host.speed.table_seconds(kind) if n_values else 0.0
    return seconds / host.parallel + tables + _CHOOSING * host.speed.python
