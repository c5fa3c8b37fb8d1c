"""Plans, recipes and results as text."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

from reap2gguf.building.estimate import Estimate, side_bytes
from reap2gguf.building.plan import Plan
from reap2gguf.pruning.select import friendly_count
from reap2gguf.quantizing.recipe import Recipe
from reap2gguf.quantizing.resolve import ResolvedRecipe
from reap2gguf.terminal.console import duration, size

if TYPE_CHECKING:
    from reap2gguf.building.pipeline import BuildResult


def plan_lines(plan: Plan, needs: Estimate) -> Iterable[str]:
    """A plan for people: counts, files, types, what it needs."""
    facts, target = plan.model.facts, plan.target
    yield f"{plan.source.label} -> {plan.name}"
    yield (
        f"  {facts.architecture}, {facts.n_layers} layers, "
        f"{_millions(plan.checkpoint.n_parameters)} parameters"
    )
    if coming := plan.checkpoint.unfetched_bytes:
        there = plan.checkpoint.n_bytes - coming
        in_cache = f"; {size(there)} are in the cache" if there > 0 else ""
        yield f"  {size(coming)} of weights are to be fetched from the Hub{in_cache}"
    yield (
        f"  experts: {target.n_kept} of {target.n_experts} stay in each of "
        f"{len(facts.moe_layers)} MoE layers, {facts.experts_per_token} a token; "
        f"{_millions(plan.n_parameters)} parameters are left"
    )
    friendly = friendly_count(target, facts.experts_per_token)
    if friendly != target.n_kept and facts.n_experts >= 32:
        yield (
            f"  {target.n_kept} experts miss vLLM's fused kernels; the nearest count that has them "
            f"is {friendly} (--keep-experts {friendly})"
        )
    yield (
        f"  calibration: {plan.calibration.label}, at most {plan.calibration.samples:,} rows of "
        f"{plan.max_length:,} tokens{', samples packed' if plan.calibration.pack else ''}"
    )
    if plan.mtp != "none":
        yield f"  the multi-token-prediction block is {plan.mtp}"
    for caveat in plan.model.caveats():
        yield f"  note: {caveat}"
    yield ""
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
    """What a build left, and how to use it."""
    manifest = result.manifest
    yield ""
    for stage in result.stages:
        again = "  (reused)" if stage.reused else ""
        peak = size(stage.peak_bytes)
        yield f"  {stage.name:<8} {stage.seconds:>8.1f} s   peak memory so far {peak}{again}"
    mtp = manifest.pruning.mtp
    if mtp.n_tokens:
        yield (
            f"  multi-token prediction: {mtp.hits_before / mtp.n_tokens:.1%} of next-next tokens "
            f"right before pruning, {mtp.hits_after / mtp.n_tokens:.1%} after"
        )
    yield ""
    for check in manifest.verification["passed"]:
        yield f"  verified  {check}"
    yield ""
    yield f"  {result.hf_folder}/  {size(manifest.hf.n_bytes)}"
    for record in manifest.gguf:
        yield f"  {result.gguf_folder / record.file}  {size(record.n_bytes)}"
    for side in manifest.side_files:
        yield f"  {result.gguf_folder / side.file}  {size(side.n_bytes)}"
    yield ""
    yield f"Try it:  reap2gguf chat {result.gguf_folder}"


def recipe_lines(recipe: Recipe) -> Iterable[str]:
    """A recipe as it will be applied, rule by rule."""
    yield f"{recipe.name}: {recipe.title}"
    yield f"  file type {recipe.file_type}, files end in -{recipe.label}.gguf"
    for rule in recipe.rules:
        only = "  (where the model has one)" if rule.optional else ""
        yield f"  {rule.match:<28} {rule.tensor_type.name}{only}"


def _millions(count: int) -> str:
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.1f} M"
