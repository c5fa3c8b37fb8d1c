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

from reap2gguf.building.needs.scoring import CHUNK, WEIGHED_TOKENS, chosen_tokens, planned_chunks
from reap2gguf.building.needs.scoring import weighed_variants as _weighed_variants
from reap2gguf.fitting.target import PROBE_TOKENS
from reap2gguf.merging.limits import merged_layers
from reap2gguf.observing.linear_attention import installed_version
from reap2gguf.quantizing.kernels.gpu_kernels import FORMS
from reap2gguf.verifying.exactness import QUICK_TYPES

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
_EXPORT = 2.4e-9  # per weight and core: to read, check and store
_READ_AGAIN = 1.2e-9  # per weight and core: for verification
_COMPARED = 0.5e-9  # per weight and core: bytes, and a sample of the values
_BOUNDS = 3e-9  # per weight and core: verified within bounds
# Weights per second that an H100 quantizes (bench/kernels.py), and types that were not measured.
_GPU_QUANTIZED = {
    "Q4_0": 80e9,
    "Q4_1": 34e9,
    "Q5_0": 75e9,
    "Q5_1": 31e9,
    "Q8_0": 83e9,
    "Q2_K": 14e9,
    "Q3_K": 22e9,
    "Q4_K": 19e9,
    "Q5_K": 19e9,
    "Q6_K": 27e9,
    "IQ4_NL": 40e9,
    "IQ4_XS": 40e9,
    "IQ3_S": 4e9,
    "IQ3_XXS": 2.6e9,
    "IQ2_S": 6e9,
    "IQ2_XS": 1.4e9,
    "IQ2_XXS": 2.6e9,
}
_GPU_UNMEASURED = 1e9
_STORED_BYTES = 2  # of a weight, on its way to the GPU
_BUS_BYTES = 2e10  # per second, to the GPU and back
_MEMORY_BYTES = 5e9  # per second, to copy or compare what is in memory
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
    python, speed, source = host.speed.python, host.speed, plan.checkpoint
    found = dict.fromkeys(STAGES, 0.0)
    found["start"] = python * (_IMPORTS + 2 * _PER_TENSOR * len(source.tensors))
    if plan.reads_texts:
        found["texts"] = _texts(plan, amount, host)
    # the first pass reads the weights from the disk; later ones find what stays in memory
    reading = _read_seconds(source.n_stored_bytes, host, is_first=True)
    waiting = max(reading, source.unfetched_bytes / host.download_bytes)
    if plan.observes:
        passing = _pass(plan, sizes, amount.n_tokens, amount, host)
        if plan.takes_sums:
            passing *= _IMATRIX if host.gpu_factor is None else _IMATRIX_ON_GPU
        spooling = _spooling(plan, amount.n_tokens, amount, disk, host)
        found["observe"] = max(passing, waiting, spooling) + python * _FIRST_PASS
        found["observe"] += _GPU_START if host.gpu_factor is not None else 0.0
        waiting = _read_seconds(plan.pruned.n_bytes, host)
    if plan.merges:
        found["merge"] = max(_merge(plan, sizes, amount, host), waiting) + python * _FIRST_PASS
    if plan.repairs:
        found["repair"] = max(_repair(plan, sizes, amount, host), waiting) + python * _FIRST_PASS
    found["weigh"] = _weigh(plan, sizes, amount, host)
    found["choose"] = _choose(plan, sizes, amount, host)
    if plan.writes_hf:
        copied = plan.hf_bytes
        found["prune"] = copied / speed.write_bytes + _read_seconds(copied, host) / 2
    if plan.computes_imatrix:
        passing = _pass(plan, sizes, amount.n_chunk_tokens, amount, host)
        passing *= _IMATRIX if host.gpu_factor is None else _IMATRIX_ON_GPU
        spooling = _spooling(plan, amount.n_chunk_tokens, amount, disk, host)
        found["imatrix"] = max(passing, waiting, spooling) + python * _PASS
    else:
        found["imatrix"] = python * _GIVEN
    if plan.sized is not None:
        found["fit"] = _fit(plan.sized, host) + _probe(plan, sizes, amount, host)
    gpu_factor = host.gpu_factor if pays_on_gpu else None
    found["export"] = _export(recipes, host, gpu_factor)
    found["verify"] = _verify(plan, recipes, sizes, disk, host, gpu_factor)
    found["evaluate"] = _evaluate(plan, sizes, amount, recipes, host)
    found["finish"] = python * _FINISH + disk.gguf / speed.hash_bytes / host.parallel * 0.1
    return found


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


def _texts(plan: Plan, amount: Amount, host: Host) -> float:
    on_hub = not all(one.is_local for one in plan.calibration.components)
    per_token = _RENDER if on_hub else _TOKENIZE
    n_tokens = amount.n_tokens + amount.n_chunk_tokens
    return host.speed.python * (0.05 + per_token * n_tokens) + (5.0 if on_hub else 0.0)


def _read_seconds(n_bytes: int, host: Host, is_first: bool = False) -> float:
    """To read weights: from the disk, or from memory where they were read before."""
    in_memory = 0 if is_first else min(n_bytes, host.page_cache)
    return (n_bytes - in_memory) / host.speed.read_bytes + in_memory / _MEMORY_BYTES


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
    return passing + host.speed.python * n_variants * _PASS + fitting


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


def _quantized(recipes: Recipes) -> dict[tuple[str, GGMLQuantizationType], int]:
    """Weights of each tensor and type: every tensor is quantized once per type."""
    return {
        (entry.tensor.name, entry.tensor_type): prod(entry.tensor.shape)
        for recipe in recipes
        for entry in recipe.table
    }


def _fit(sized: SizedFile, host: Host) -> float:
    """Sampled rows of each tensor, quantized to all types and compared, and then the choice."""
    seconds = tables = 0.0
    for kind, n_values in sized.sampled.items():
        seconds += n_values * _COMPARED
        if host.gpu_factor is None or kind not in FORMS:
            seconds += host.speed.quantize_seconds(kind, n_values)
        tables += host.speed.table_seconds(kind) if n_values else 0.0
    return seconds / host.parallel + tables + _CHOOSING * host.speed.python


def _export(recipes: Recipes, host: Host, gpu_factor: float | None) -> float:
    """Every tensor is read once, and quantized once per type."""
    types = _quantized(recipes)
    weights = {name: n for (name, _), n in types.items()}
    seconds = _EXPORT * sum(weights.values()) * host.speed.python / host.parallel
    written = sum(recipe.n_bytes for recipe in recipes)
    on_cpu, on_gpu = _quantizing(types, written, host, gpu_factor)
    seconds += on_cpu / host.parallel
    return max(seconds, on_gpu, written / host.speed.write_bytes) + _tables(types, host)


def _quantizing(
    types: Mapping[tuple[str, GGMLQuantizationType], int],
    n_bytes: int,
    host: Host,
    gpu_factor: float | None,
) -> tuple[float, float]:
    """Seconds of one core, and of a GPU, which gets weights once and returns `n_bytes` at most."""
    on_cpu, on_gpu = 0.0, 0.0
    sent: dict[str, int] = {}
    for (name, kind), n_weights in types.items():
        if gpu_factor is not None and kind in FORMS:
            rate = _GPU_QUANTIZED.get(kind.name, _GPU_UNMEASURED)
            on_gpu += n_weights / rate * gpu_factor
            sent[name] = n_weights
        else:
            on_cpu += host.speed.quantize_seconds(kind, n_weights)
    moved = _STORED_BYTES * sum(sent.values()) + (n_bytes if sent else 0)
    return on_cpu, max(on_gpu, moved / _BUS_BYTES)


def _tables(types: Mapping[tuple[str, GGMLQuantizationType], int], host: Host) -> float:
    """Tables that are made while all other threads wait."""
    return sum(host.speed.table_seconds(kind) for kind in {kind for _, kind in types})


def _verify(
    plan: Plan,
    recipes: Recipes,
    sizes: Sizes,
    disk: DiskNeeds,
    host: Host,
    gpu_factor: float | None,
) -> float:
    """Both formats are read back and compared; most types are quantized again, once.

    With `gpu_factor` a GPU does that for the types that it has kernels for, beside the processor.
    """
    speed = host.speed
    exact = sizes.exact(host.gpu_factor is not None)
    weights = {name: n for (name, _), n in _quantized(recipes).items()}
    seconds = _READ_AGAIN * sum(weights.values()) * speed.python
    again: dict[tuple[str, GGMLQuantizationType], int] = {}
    for recipe in recipes:
        for entry in recipe.table:
            n_weights = prod(entry.tensor.shape)
            if recipe.name in exact or entry.tensor_type in QUICK_TYPES:
                again[entry.tensor.name, entry.tensor_type] = n_weights
                seconds += _COMPARED * n_weights * speed.python
            else:
                seconds += _BOUNDS * n_weights * speed.python
    on_cpu, on_gpu = _quantizing(again, disk.gguf, host, gpu_factor)
    seconds += on_cpu
    hashing = (disk.hf + disk.gguf) / speed.hash_bytes
    comparing = 2 * plan.hf_bytes / _MEMORY_BYTES
    return max((seconds + hashing) / host.parallel, on_gpu) + comparing
