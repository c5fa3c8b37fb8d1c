"""What a plan refuses before anything is computed: options that this model, or a file, rules out.

Where the checks of one part fill a page, they have a module of their own, such as `given.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from reap2gguf.building.as_stored import check_gguf_options
from reap2gguf.building.given import check_given_minimum
from reap2gguf.calibration.sources import check_calibration
from reap2gguf.errors import UsageError
from reap2gguf.gguf_files.imatrix_coverage import check_coverage
from reap2gguf.merging.limits import check_merge
from reap2gguf.pruning.methods import GROUP_SIZE, merges
from reap2gguf.pruning.protection import check_protection
from reap2gguf.quantizing.ik.workers import check_installed
from reap2gguf.quantizing.minimum import check_needed
from reap2gguf.quantizing.source_blocks import note_blocks
from reap2gguf.repairing.limits import check_repair

if TYPE_CHECKING:
    from reap2gguf.building.given import GivenObservations
    from reap2gguf.building.plan import Plan
    from reap2gguf.building.weighed import Opened
    from reap2gguf.hub.retry import Note
    from reap2gguf.options import BuildOptions
    from reap2gguf.pruning.select import Target


def check_changes(options: BuildOptions, opened: Opened, target: Target, note: Note) -> None:
    """Refuse what cannot be done to this model, or not with so many experts: UsageError."""
    check_gguf_options(options, opened.checkpoint, target)
    if options.repair != "none":
        check_repair(opened.checkpoint, opened.model, target.prunes)
    if options.dequantize and not target.prunes:
        raise UsageError(
            "--dequantize: no expert is removed, so no safetensors are written; leave it out, or "
            "pass --keep-experts"
        )


def check_choice_of_experts(
    options: BuildOptions, opened: Opened, target: Target, given: GivenObservations | None
) -> None:
    """Refuse a method and protected experts that leave no such choice: UsageError."""
    seen = None if given is None else given.seen
    if merges(options.method):
        how = options.method, target, options.protection, options.group_size or GROUP_SIZE
        check_merge(opened.checkpoint, opened.model, *how)
    elif target.prunes:
        check_protection(options.protection, seen, options.method, target, opened.model.facts)


def check_types(plan: Plan, note: Note) -> None:
    """Refuse types that the importance matrix, or this machine, does not allow.

    `note` receives which blocks of a GGUF source stay, and what a given matrix lacks. Raises
    RecipeError and ArtifactError.
    """
    imatrix, options = plan.imatrix, plan.options
    # types that are chosen in the build are guesses here
    note_blocks(plan.checkpoint, plan.recipes[: -1 if plan.sized else None], note)
    check_installed(plan.recipes)
    for recipe in () if plan.slices else plan.recipes:
        why = "none is computed for it" if imatrix is None else f"{imatrix.file} has none for it"
        check_needed(recipe, plan.weighted, why)
    if imatrix is not None:
        check_coverage(imatrix.coverage, str(options.imatrix or options.observations))
        check_given_minimum(plan.recipes, imatrix, None)
        for line in imatrix.notes:
            note(line)


def check_texts(plan: Plan, is_checked: bool) -> None:
    """Make what reads texts, and refuse texts that cannot be read: CalibrationError.

    `is_checked`: the calibration has been looked at.
    """
    if plan.reads_texts:
        plan.source.make_tokenizer()
    if plan.reads_calibration and not is_checked:
        check_calibration(plan.calibration, plan.files)
