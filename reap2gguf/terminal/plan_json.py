"""A plan as JSON: everything that its text says, and the type of every tensor."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from reap2gguf.building.needs.rented import GPUS
from reap2gguf.exporting.quantizers import quantizers_of
from reap2gguf.pruning.select import friendly_count, is_fused
from reap2gguf.terminal.plan_advice import coverage_as_json
from reap2gguf.terminal.target_views import target_as_json

if TYPE_CHECKING:
    from reap2gguf.building.needs.estimate import Estimate
    from reap2gguf.building.plan import Plan
    from reap2gguf.quantizing.resolve import ResolvedRecipe


def plan_as_json(plan: Plan, needs: Estimate) -> dict[str, Any]:
    """A plan for programs: everything that `plan_lines` prints, and the whole type table."""
    return {
        "name": plan.name,
        "source": plan.source.label,
        "revision": plan.source.revision,
        "unfetched_bytes": plan.checkpoint.unfetched_bytes,
        "architecture": plan.model.facts.architecture,
        "experts": _experts_as_json(plan),
        "original": None
        if plan.history is None
        else {"source": plan.history.label, "experts": plan.history.n_experts},
        "mtp": plan.mtp,
        "caveats": list(plan.caveats),
        "warnings": plan.warnings,
        "observations": None if plan.observations is None else plan.observations.file,
        "imatrix_from": plan.options.imatrix_from,
        "imatrix": None if plan.imatrix is None else plan.imatrix.file,
        "imatrix_coverage": None if plan.imatrix is None else asdict(plan.imatrix.coverage),
        "coverage": coverage_as_json(needs.reused.coverage),
        "calibration": _calibration_as_json(plan, needs),
        "scored_chunks": needs.n_scored_chunks,
        "side_files": [plan.side_name(side) for side in plan.side_files],
        "parameters": {"source": plan.checkpoint.n_parameters, "kept": plan.n_parameters},
        "safetensors_bytes": plan.hf_bytes,
        "target": target_as_json(plan),
        "files": [_file_as_json(plan, recipe) for recipe in plan.recipes],
        "quantizers": _quantizers_as_json(plan),
        "machine": _machine_as_json(needs),
        "estimate": _estimate_as_json(needs),
        "reused": list(needs.reused.stages),
        "fits": needs.fits,
        "problems": list(needs.problems),
        "advice": list(needs.advice),
        "rented": [_rented_as_json(name, needs.rented(name)) for name in GPUS],
    }


def _experts_as_json(plan: Plan) -> dict[str, Any]:
    facts = plan.model.facts
    return {
        "source": facts.n_experts,
        "kept": plan.target.n_kept,
        "weighed": list(plan.counts) if plan.weighs else None,
        "per_token": facts.experts_per_token,
        "layers": len(facts.moe_layers),
        "friendly": friendly_count(plan.target, facts.experts_per_token),
        "groups": facts.n_groups,
        "fused_top_k": facts.n_groups == 1 and is_fused(plan.target.n_kept),
    }


def _calibration_as_json(plan: Plan, needs: Estimate) -> dict[str, Any]:
    return {
        "spec": plan.calibration.label,
        "rows": needs.amount.n_rows,
        "tokens": needs.amount.n_tokens,
        "known": needs.amount.known,
        "max_length": plan.max_length,
        "pack": plan.calibration.pack,
    }


def _file_as_json(plan: Plan, recipe: ResolvedRecipe) -> dict[str, Any]:
    return {
        "file": plan.gguf_name(recipe),
        "recipe": recipe.name,
        "file_type": recipe.file_type,
        "bytes": sum(plan.file_sizes(recipe)),
        "bits_per_weight": round(recipe.bits_per_weight, 4),
        "tensors": {name: one.name for name, one in recipe.tensor_types().items()},
        "fallbacks": {
            entry.tensor.name: entry.wanted.name for entry in recipe.table if entry.wanted
        },
    }


def _quantizers_as_json(plan: Plan) -> dict[str, Any]:
    found = quantizers_of(plan.recipes, plan.weighted, plan.options.compute.device)
    return {
        "kernels": found.target or None,
        "problem": found.problem or None,
        "on_gpu": list(found.on_gpu),
        "by_kernels": list(found.by_kernels),
        "by_libggml": list(found.by_libggml),
    }


def _machine_as_json(needs: Estimate) -> dict[str, Any]:
    machine = needs.machine
    gpu = machine.gpu if needs.has_device else None
    return {
        "device": machine.device,
        "gpu": gpu and gpu.name,
        "gpu_memory_bytes": gpu and gpu.n_bytes,
        "memory_bytes": machine.memory_bytes,
        "memory_free_bytes": machine.memory_free_bytes,
        "disk_free_bytes": machine.disk_free_bytes,
        "cores": machine.cores,
    }


def _estimate_as_json(needs: Estimate) -> dict[str, Any]:
    return {
        "disk_bytes": needs.disk_bytes,
        "work_bytes": needs.work_bytes,
        "disk_peak_bytes": needs.peak_bytes,
        "memory_bytes": needs.memory_bytes,
        "gpu_memory_bytes": needs.gpu_memory_bytes,
        "seconds": round(needs.seconds, 1),
        "stages": {name: round(seconds, 2) for name, seconds in needs.stages.items()},
        "hidden_states": {"bytes": needs.sweeps.hidden_bytes, "where": needs.hidden_where},
    }


def _rented_as_json(name: str, needs: Estimate) -> dict[str, Any]:
    """A machine to rent: at least this much memory and disk, downloaded weights included."""
    return {
        "gpu": name,
        "gpu_memory_bytes": needs.gpu_memory_bytes,
        "memory_bytes": needs.memory_bytes,
        "disk_bytes": needs.peak_bytes + needs.plan.checkpoint.n_stored_bytes,
        "seconds": round(needs.seconds, 1),
        "fits": needs.fits,
    }
