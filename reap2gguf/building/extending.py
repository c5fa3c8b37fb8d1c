"""A build whose bundle is finished but for some files: it only writes those."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from reap2gguf.artifacts.made_with import other_versions
from reap2gguf.building.adding import Addition, extend, open_reference
from reap2gguf.building.exact import exact_recipes
from reap2gguf.building.record import program_versions
from reap2gguf.building.stage import BuildResult
from reap2gguf.pruning.view import PrunedView

if TYPE_CHECKING:
    from reap2gguf.building.stage import Run
    from reap2gguf.building.standing import Standing


def extend_finished(run: Run, found: Standing) -> BuildResult:
    """Say what of the bundle stays, and write what is missing; nothing if it is up to date.

    Raises what `extend` raises.
    """
    _report(run, found)
    if found.is_up_to_date:
        return BuildResult.of(run.work, found.manifest)
    work, plan, manifest = run.work, run.plan, found.manifest
    compute, addition = plan.options.compute, _addition(run, found)
    if manifest.hf is None:
        kept = {layer: tuple(ids) for layer, ids in manifest.pruning.kept.items()}
        view = PrunedView(plan.checkpoint, plan.model, kept)
        return extend(addition, (view, view.model), compute, run.progress)
    with open_reference(manifest, work.final_hf) as reference:
        return extend(addition, reference, compute, run.progress)


def _others(run: Run, found: Standing) -> list[str]:
    """Files that stay though the command does not name them."""
    return [one.file for one in found.stay if one.file not in run.keys.inputs.recipes]


def _report(run: Run, found: Standing) -> None:
    name, note = run.work.name, run.progress.note
    if others := _others(run, found):
        note(f"not named by this command, kept: {', '.join(others)} (--replace deletes them)")
    for file in found.gone:
        note(f"{file} was removed from the bundle")
    for record in found.dropped:
        note(f"{record.file} is deleted")
    if not found.is_up_to_date:
        note(f"{name}: the finished bundle is extended; nothing is observed or pruned again")
        return
    versions = other_versions(found.manifest.program, program_versions())
    state = f"up to date, {versions}" if versions else "up to date"
    note(f"{name}: {state}; `reap2gguf verify` checks it, --fresh builds it from scratch")


def _addition(run: Run, found: Standing) -> Addition:
    plan, made = run.plan, run.keys.inputs.recipes
    stay = [record.file for record in found.stay]
    earlier = run.work.finished()
    recipes = {} if earlier is None else earlier.inputs.recipes
    kept = {name: key for name, key in recipes.items() if name in stay}
    return Addition(
        run.work.of_addition(),
        found.manifest,
        found.missing,
        stay=found.stay,
        # a command that names every file also gives their order
        order=[*stay, *made] if _others(run, found) else [*made],
        inputs=replace(run.keys.inputs, recipes={**kept, **made}),
        exact=exact_recipes(plan, plan.options.compute.likely_device == "cuda"),
    )
