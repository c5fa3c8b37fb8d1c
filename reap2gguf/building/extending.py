"""A build whose bundle is finished but for some files: it only writes those."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from reap2gguf import __version__
from reap2gguf.artifacts.made_with import other_versions
from reap2gguf.building.adding import Addition, extend, open_reference
from reap2gguf.building.exact import exact_recipes
from reap2gguf.building.record import program_versions
from reap2gguf.building.sized import choose_types
from reap2gguf.building.stage import BuildResult
from reap2gguf.bundle.layout import IMATRIX_FILE
from reap2gguf.exporting.header_facts import HeaderNames
from reap2gguf.pruning.view import PrunedView

if TYPE_CHECKING:
    from reap2gguf.building.stage import Run
    from reap2gguf.building.standing import Standing
    from reap2gguf.bundle.manifest import Manifest
    from reap2gguf.pruning.select import Kept
    from reap2gguf.verifying.context import Reference


def extend_finished(run: Run, found: Standing) -> BuildResult:
    """Say what of the bundle stays, and write what is missing; nothing if it is up to date.

    Raises what `extend` raises.
    """
    _report(run, found)
    if found.is_up_to_date:
        return BuildResult.of(run.work, found.manifest)
    plan, manifest = run.plan, found.manifest
    if manifest.hf is None:
        view = PrunedView(plan.checkpoint, plan.model, _kept(manifest))
        return _extend(run, found, (view, view.model))
    with open_reference(manifest, run.work.final_hf) as reference:
        return _extend(run, found, reference)


def _extend(run: Run, found: Standing, reference: Reference) -> BuildResult:
    found = _with_types(run, found, reference)
    return extend(_addition(run, found), reference, run.plan.options.compute, run.progress)


def _with_types(run: Run, found: Standing, reference: Reference) -> Standing:
    """The types of a file that is to have a size, chosen now if the file is missing."""
    plan, manifest = run.plan, found.manifest
    if plan.sized is None or not any(one is plan.recipes[-1] for one in found.missing):
        return found
    names, imatrix = HeaderNames.of(manifest, __version__), run.work.final_gguf / IMATRIX_FILE
    kept = _kept(manifest)
    chosen = choose_types(run, plan.sized, reference, kept, names, imatrix).resolved
    missing = [chosen if one is plan.recipes[-1] else one for one in found.missing]
    run.plan = plan.with_types(chosen)
    return replace(found, missing=missing)


def _kept(manifest: Manifest) -> Kept:
    return {layer: tuple(ids) for layer, ids in manifest.pruning.kept.items()}


def _others(run: Run, found: Standing) -> list[str]:
    """Files that stay though the command does not name them."""
    return [one.file for one in found.stay if one.file not in run.keys.inputs.recipes]


def _report(run: Run, found: Standing) -> None:
    name, note = run.work.name, run.progress.note
    if others := _others(run, found):
        note(f"not named by this command, kept: {', '.join(others)} (--replace deletes them)")
    for file in found.gone:
        note(f"{file} was removed from the bundle")
    for file in found.changed:
        note(f"{file} was changed since the bundle was finished; it is written again")
    for record in found.dropped:
        note(f"{record.file} is deleted")
    if not found.is_up_to_date:
        note(f"{name}: the finished bundle is extended; nothing is observed or pruned again")
        return
    versions = other_versions(found.manifest.program, program_versions())
    state = f"up to date, {versions}" if versions else "up to date"
    note(f"{name}: {state}; {_what_was_checked(found)}; --fresh builds it from scratch")


def _what_was_checked(found: Standing) -> str:
    """By what the files were taken for the same."""
    stamped = found.n_files - found.n_hashed
    text = f"{stamped:,} files have the size and the time of change that the build left"
    if found.n_hashed:
        text += f", and {found.n_hashed:,} with another time have their SHA-256"
    if not stamped:
        return f"{found.n_hashed:,} files have their SHA-256"
    return f"{text} (`reap2gguf verify` reads all bytes)"


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
        with_toml=plan.with_toml,
    )
