"""The time of writing GGUF files and of verifying both formats, from counts of their tensors.

Rates of a processor are measured (`speed.py`), those of a GPU are an H100's, scaled to others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING

from gguf import GGMLQuantizationType

from reap2gguf.quantizing.kernels.gpu_kernels import FORMS
from reap2gguf.verifying.exactness import QUICK_TYPES

if TYPE_CHECKING:
    from reap2gguf.building.needs.disk import DiskNeeds
    from reap2gguf.building.needs.seconds import Host
    from reap2gguf.building.needs.sizes import Sizes
    from reap2gguf.building.plan import Plan
    from reap2gguf.quantizing.resolve import ResolvedRecipe

    Recipes = Sequence[ResolvedRecipe]

MEMORY_BYTES = 5e9  # per second, to copy or compare what is in memory
# Seconds on the reference machine of speed.py.
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


def export_seconds(recipes: Recipes, host: Host, gpu_factor: float | None) -> float:
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


def verify_seconds(
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
    comparing = 2 * plan.hf_bytes / MEMORY_BYTES
    return max((seconds + hashing) / host.parallel, on_gpu) + comparing


def _quantized(recipes: Recipes) -> dict[tuple[str, GGMLQuantizationType], int]:
    """Weights of each tensor and type: every tensor is quantized once per type."""
    return {
        (entry.tensor.name, entry.tensor_type): prod(entry.tensor.shape)
        for recipe in recipes
        for entry in recipe.table
    }
