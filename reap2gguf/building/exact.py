"""Decides which files of a build are verified by quantizing every tensor again."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from reap2gguf.calibration.spec import DEFAULT_MIX, Component
from reap2gguf.models.description import Carried, Dropped, Expert
from reap2gguf.resources import shipped_folder
from reap2gguf.verifying.exactness import QUICK_TYPES, SMALL_FILE

if TYPE_CHECKING:
    from reap2gguf.building.plan import Plan
    from reap2gguf.quantizing.resolve import ResolvedRecipe

# Fixed rates: what is verified, and recorded, may not depend on the machine.
_CPU_FLOPS = 60e9  # per core, float32
_GPU_FLOPS = 150e12
_QUANTIZED_WEIGHTS = 11e6  # per core and second, of types that have codebooks
_CORES_BESIDE_A_GPU = 16
_MOST_EXACT = 0.1  # of a build, for quantizing large files again
_UNKNOWN = 2**62


def exact_recipes(plan: Plan, has_gpu: bool, active: int | None = None) -> frozenset[str]:
    """Names of the recipes whose files are verified by quantizing every tensor again.

    It finds every changed bit. It is done for every small file, and for those whose types the
    compiled kernels make at little more than the cost of reading them. For other large ones it
    takes as long as the export did, and is done if that is cheap beside the calibration passes. The
    answer depends on the plan and the kind of device, not on a clock, the number of threads or the
    kernels: the same inputs make the same manifest. `active`: what `active_parameters` returns,
    where it is known.
    """
    always = {recipe.name for recipe in plan.recipes if is_always_exact(recipe)}
    quantized = sum(
        math.prod(entry.tensor.shape)
        for recipe in plan.recipes
        for entry in recipe.table
        if recipe.name not in always and entry.tensor_type not in QUICK_TYPES
    )
    active = active_parameters(plan) if active is None else active
    flops = 2 * 2 * tokens_at_most(plan) * active
    cores = _CORES_BESIDE_A_GPU if has_gpu else 1
    sweeps = flops / (_GPU_FLOPS if has_gpu else _CPU_FLOPS)
    again = quantized / (_QUANTIZED_WEIGHTS * cores)
    if again > _MOST_EXACT * (sweeps + again):
        return frozenset(always)
    return frozenset(recipe.name for recipe in plan.recipes)


def is_always_exact(recipe: ResolvedRecipe) -> bool:
    """Whether a file is verified by quantizing again, whatever else a build does."""
    is_quick = all(entry.tensor_type in QUICK_TYPES for entry in recipe.table)
    return is_quick or recipe.n_bytes < SMALL_FILE


def tokens_at_most(plan: Plan) -> int:
    """Tokens of a calibration pass, at most: what was asked for, or what the texts can hold."""
    calibration, length = plan.calibration, plan.max_length
    rows = ((one, calibration.rows_of(one)) for one in calibration.components)
    found = sum(min(count * length, _tokens_in(one)) for one, count in rows)
    return min(calibration.samples * length, found)


def _tokens_in(component: Component) -> int:
    """Upper bound of the tokens in local files; nothing is known about files on the Hub."""
    if not component.is_local or component.path.suffix == ".parquet":
        return _UNKNOWN
    path = shipped_folder("calibration") if component.name == DEFAULT_MIX else component.path
    files = [path, *path.glob("*")] if path.is_dir() else [path]
    # text has at least two bytes per token; Parquet is compressed
    return sum(file.stat().st_size for file in files if file.is_file()) // 2 + 1


def active_parameters(plan: Plan) -> int:
    """Parameters that one token uses, without the embedding."""
    facts = plan.model.facts
    looked_up = (plan.model.embedding_name, plan.model.mtp_embedding_name)
    total = 0
    for name, tensor in plan.checkpoint.tensors.items():
        role = plan.model.role(name)
        if isinstance(role, Carried | Dropped):
            continue
        if isinstance(role, Expert):
            total += tensor.n_elements * facts.experts_per_token // facts.n_experts
        elif name not in looked_up:
            total += tensor.n_elements
    return total
