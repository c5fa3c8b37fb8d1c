"""Puts what was measured of a finished bundle into its manifest, its cards and its pictures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from reap2gguf.building.add import recover
from reap2gguf.building.adding import Addition, extend, open_reference
from reap2gguf.building.bundle_files import check_bundle_files, is_changed
from reap2gguf.building.finished import Inputs
from reap2gguf.building.workdir import Workdir
from reap2gguf.bundle.evaluation_update import outdated_groups, updated
from reap2gguf.bundle.opening import open_bundle
from reap2gguf.errors import UsageError

if TYPE_CHECKING:
    from reap2gguf.building.stage import BuildResult
    from reap2gguf.bundle.evaluation import Evaluation
    from reap2gguf.options import ComputeOptions
    from reap2gguf.progress import Progress
    from reap2gguf.verifying.context import Reference


def check_recordable(bundle: Path, compute: ComputeOptions, progress: Progress) -> None:
    """Refuse a bundle that `record_evaluation` would refuse after hours of measuring.

    Raises VerificationError if its files are others than were verified.
    """
    recover(bundle)
    opened = open_bundle(bundle)
    work = Workdir(opened.folders.output, opened.folders.name, opened.hf is not None)
    with work.locked():
        work.finish_interrupted()
        manifest = open_bundle(bundle).manifest
        check_bundle_files(work, manifest, manifest.gguf, (), compute.threads, progress)


def record_evaluation(
    bundle: Path,
    evaluation: Evaluation,
    source: Reference | None,
    compute: ComputeOptions,
    progress: Progress,
) -> BuildResult:
    """Write the cards of a bundle again, with this evaluation.

    Of an earlier evaluation, what was not measured again stays (`bundle/evaluation_update.py`).
    `source` is the model that was measured, and what a bundle without safetensors was made from.
    Raises UsageError if the evaluation is of other files, and what `extend` raises; then the bundle
    is as it was.
    """
    recover(bundle)
    opened = open_bundle(bundle)
    work = Workdir(opened.folders.output, opened.folders.name, opened.hf is not None)
    with work.locked():
        work.finish_interrupted()
        manifest = open_bundle(bundle).manifest
        names = {record.file for record in manifest.gguf}
        if others := sorted({one.name for one in evaluation.of_kind("gguf")} - names):
            raise UsageError(f"{bundle}: {others[0]} was measured, but the bundle has no such file")
        if manifest.evaluation is not None:
            evaluation = _updated(manifest.evaluation, evaluation, progress)
        finished = work.finished()
        is_own = finished is not None and not is_changed(work, manifest)
        addition = Addition(
            work.of_addition(),
            manifest,
            stay=manifest.gguf,
            order=[record.file for record in manifest.gguf],
            inputs=finished.inputs if finished is not None and is_own else Inputs(""),
            evaluation=evaluation,
        )
        if manifest.hf is not None:
            with open_reference(manifest, work.final_hf) as reference:
                return extend(addition, reference, compute, progress)
        if source is None:
            raise UsageError(f"{bundle}: has no safetensors; pass the model it was made from")
        return extend(addition, source, compute, progress)


def _updated(earlier: Evaluation, newer: Evaluation, progress: Progress) -> Evaluation:
    """Both together; what of the earlier one is given up is reported."""
    found = updated(earlier, newer)
    names = {one.name for one in found.variants}
    if dropped := [one.name for one in earlier.variants if one.name not in names]:
        progress.note(
            f"the earlier figures of {', '.join(dropped)} are removed: they are of another text, "
            "engine or type than the new ones; measure all variants together to have both"
        )
    if groups := outdated_groups(earlier, found):
        progress.note(
            f"the earlier figures of {', '.join(groups)} are removed: a task in it is no longer "
            "what it was; measure the whole group to have them again"
        )
    kept = [
        what
        for what, before, now in (
            ("the text", earlier.text, newer.text),
            ("tasks", earlier.tasks, newer.tasks),
            ("speeds", earlier.speeds, newer.speeds),
            ("answers", earlier.smoke_tests, newer.smoke_tests),
        )
        if before and not now
    ]
    if kept:
        progress.note(f"earlier figures that were not measured again stay: {', '.join(kept)}")
    return found
