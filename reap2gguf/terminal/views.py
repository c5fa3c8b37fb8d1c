"""Plans, recipes and results as text."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from reap2gguf.building.estimate import Estimate, side_bytes
from reap2gguf.messages import duration, parameters, shell_word, size
from reap2gguf.pruning.select import friendly_count

if TYPE_CHECKING:
    from reap2gguf.building.plan import Plan
    from reap2gguf.building.stage import BuildResult
    from reap2gguf.quantizing.resolve import ResolvedRecipe


def plan_lines(plan: Plan, needs: Estimate) -> Iterable[str]:
    """A plan for people: counts, files, types and what the build needs."""
    facts, target = plan.model.facts, plan.target
    yield f"{plan.source.label} -> {plan.name}"
    yield (
        f"  {facts.architecture}, {facts.n_layers} layers, "
        f"{parameters(plan.checkpoint.n_parameters)} parameters"
    )
    if unfetched := plan.checkpoint.unfetched_bytes:
        cached = plan.checkpoint.n_bytes - unfetched
        in_cache = f"; {size(cached)} are in the cache" if cached > 0 else ""
        yield f"  {size(unfetched)} of weights will be fetched from the Hub{in_cache}"
    yield (
        f"  experts: keeps {target.n_kept} of {target.n_experts} in each of "
        f"{len(facts.moe_layers)} MoE layers, {facts.experts_per_token} active per token; "
        f"{parameters(plan.n_parameters)} parameters remain"
    )
    if not target.prunes:
        yield "  nothing is pruned: no pass to rank experts, and no copy of the safetensors"
    if plan.history is not None:
        yield (
            f"  the source was pruned before: it has {target.n_experts} of the "
            f"{plan.history.n_experts} experts of {plan.history.label}"
        )
    friendly = friendly_count(target, facts.experts_per_token)
    if target.prunes and friendly != target.n_kept and facts.n_experts >= 32:
        yield (
            f"  vLLM has no fused kernels for {target.n_kept} experts; the nearest count that has "
            f"them is {friendly} (--keep-experts {friendly})"
        )
    yield f"  calibration: {', '.join(_calibration_parts(plan))}"
    if plan.mtp != "none":
        yield f"  multi-token-prediction block: {plan.mtp}"
    for caveat in plan.caveats:
        yield f"  note: {caveat}"
    for warning in plan.warnings:
        yield f"  warning: {warning}"
    yield ""
    if plan.writes_hf:
        yield f"  {plan.name}/  safetensors  {size(plan.hf_bytes)}"
    for recipe in plan.recipes:
        yield (
            f"  {plan.gguf_name(recipe)}  {size(recipe.n_bytes)}, "
            f"{recipe.bits_per_weight:.2f} bits per weight, {recipe.file_type}"
        )
        yield from _type_lines(recipe)
    for side in plan.side_files:
        yield f"  {plan.side_name(side)}  {size(side_bytes(side))}, {side.title}"
    yield ""
    yield (
        f"  needs {size(needs.disk_bytes)} of disk, about {size(needs.memory_bytes)} of "
        f"{needs.memory}, about {duration(needs.seconds)}"
    )


def _calibration_parts(plan: Plan) -> Iterator[str]:
    """What ranks the experts and weights the quantization: given files, or text."""
    if plan.observations is not None:
        yield f"observations: {plan.observations.file}, reused"
    if plan.imatrix is not None:
        yield f"importance matrix: {plan.imatrix.file}, reused"
    if plan.reads_calibration:
        yield plan.calibration.label
        yield f"at most {plan.calibration.samples:,} rows of {plan.max_length:,} tokens"
        if plan.calibration.pack:
            yield "samples packed"


def plan_as_json(plan: Plan, needs: Estimate) -> dict[str, Any]:
    """A plan for programs: everything that `plan_lines` prints, and the whole type table."""
    facts = plan.model.facts
    return {
        "name": plan.name,
        "source": plan.source.label,
        "revision": plan.source.revision,
        "unfetched_bytes": plan.checkpoint.unfetched_bytes,
        "architecture": facts.architecture,
        "experts": {
            "source": facts.n_experts,
            "kept": plan.target.n_kept,
            "per_token": facts.experts_per_token,
            "layers": len(facts.moe_layers),
            "friendly": friendly_count(plan.target, facts.experts_per_token),
        },
        "original": None
        if plan.history is None
        else {"source": plan.history.label, "experts": plan.history.n_experts},
        "mtp": plan.mtp,
        "caveats": list(plan.caveats),
        "warnings": plan.warnings,
        "observations": None if plan.observations is None else plan.observations.file,
        "imatrix": None if plan.imatrix is None else plan.imatrix.file,
        "calibration": {
            "spec": plan.calibration.label,
            "rows": plan.calibration.samples,
            "max_length": plan.max_length,
            "pack": plan.calibration.pack,
        },
        "side_files": [plan.side_name(side) for side in plan.side_files],
        "parameters": {"source": plan.checkpoint.n_parameters, "kept": plan.n_parameters},
        "safetensors_bytes": plan.hf_bytes,
        "files": [
            {
                "file": plan.gguf_name(recipe),
                "recipe": recipe.name,
                "file_type": recipe.file_type,
                "bytes": recipe.n_bytes,
                "bits_per_weight": round(recipe.bits_per_weight, 4),
                "tensors": {
                    name: tensor_type.name for name, tensor_type in recipe.tensor_types().items()
                },
            }
            for recipe in plan.recipes
        ],
        "estimate": {
            "disk_bytes": needs.disk_bytes,
            "memory_bytes": needs.memory_bytes,
            "seconds": round(needs.seconds),
        },
    }


def _type_lines(recipe: ResolvedRecipe) -> Iterable[str]:
    """The type table with layer numbers collapsed: one line per tensor name and type."""
    groups: Counter[tuple[str, str, str]] = Counter()
    for entry in recipe.table:
        name = re.sub(r"^blk\.\d+\.", "blk.*.", entry.tensor.name)
        groups[name, entry.tensor_type.name, entry.rule or ""] += 1
    width = max(len(name) for name, _, _ in groups)
    names = list(dict.fromkeys(name for name, _, _ in groups))
    for (name, type_name, rule), count in sorted(
        groups.items(), key=lambda g: names.index(g[0][0])
    ):
        times = f"x{count}" if name.startswith("blk.") else ""
        because = f"rule {rule}" if rule else ""
        yield f"    {name:<{width}}  {type_name:<6} {times:<4} {because}".rstrip()


def result_lines(result: BuildResult) -> Iterable[str]:
    """What a build wrote, and how to use it."""
    manifest = result.manifest
    yield ""
    for stage in result.stages:
        again = "  (reused)" if stage.reused else ""
        peak = size(stage.peak_bytes)
        yield f"  {stage.name:<8} {stage.seconds:>8.1f} s   peak memory so far {peak}{again}"
    mtp = manifest.pruning.mtp
    if mtp.n_tokens and mtp.state == "pruned":
        yield (
            f"  MTP head top-1 accuracy: {mtp.hits_before / mtp.n_tokens:.1%} before pruning, "
            f"{mtp.hits_after / mtp.n_tokens:.1%} after"
        )
    yield ""
    if any(stage.name == "verify" and not stage.reused for stage in result.stages):
        for check in manifest.verification["passed"]:
            yield f"  verified  {check}"
        yield ""
    if manifest.hf is not None:
        yield f"  {result.hf_folder}/  {size(manifest.hf.n_bytes)}"
    for record in manifest.gguf:
        yield f"  {result.gguf_folder / record.file}  {size(record.n_bytes)}"
    for side in manifest.side_files:
        yield f"  {result.gguf_folder / side.file}  {size(side.n_bytes)}"
    yield ""
    yield f"Try it:  reap2gguf chat {shell_word(result.gguf_folder)}"
