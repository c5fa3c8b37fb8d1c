"""What `prune` makes of a model: experts that stay as they are, are repaired, or take in others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from reap2gguf.api.repairs import repaired_model, rows_of
from reap2gguf.api.selecting import Selection, Wanted, chosen
from reap2gguf.pruning.methods import GROUP_SIZE, merges

if TYPE_CHECKING:
    from reap2gguf.api.opening import PathLike
    from reap2gguf.artifacts.observations import Observations
    from reap2gguf.bundle.records import MergeRecord, RepairRecord
    from reap2gguf.checkpoint.checkpoint import Checkpoint
    from reap2gguf.hub.opened import OpenModel
    from reap2gguf.options import CalibrationOptions, ComputeOptions
    from reap2gguf.progress import Progress
    from reap2gguf.pruning.view import PrunedView

    Made = tuple[PrunedView, Selection, RepairRecord | MergeRecord | None]


@dataclass(frozen=True)
class Changes:
    """How experts get new weights, if they do."""

    checkpoint: Checkpoint  # the source, or its values decoded
    output: Path  # beside which they wait
    repair: str
    group_size: int | None
    calibration: CalibrationOptions
    compute: ComputeOptions


@contextmanager
def pruned_model(
    opened: OpenModel,
    observations: Observations | PathLike | None,
    wanted: Wanted,
    changes: Changes,
    shown: Progress,
) -> Iterator[Made]:
    """The pruned model, which experts it keeps, and what was done to them."""
    from reap2gguf.building.given import check_needs_observations

    if merges(wanted.method) and wanted.kept is None:
        check_needs_observations(wanted.method, observations)
        with _merged(opened, wanted, changes, shown) as made:
            yield made
        return
    selection = chosen(opened, observations, wanted, shown)
    from reap2gguf.pruning.view import PrunedView

    pruned = PrunedView(changes.checkpoint, opened.model, selection.kept)
    if changes.repair == "none":
        yield pruned, selection, None
        return
    how = changes.repair, changes.calibration, changes.compute
    with repaired_model(opened, pruned, changes.output, how, shown) as (view, record):
        yield view, selection, record


@contextmanager
def _merged(opened: OpenModel, wanted: Wanted, changes: Changes, shown: Progress) -> Iterator[Made]:
    """The merged model, whose experts are found by the merge itself."""
    from reap2gguf.merging.limits import check_merge
    from reap2gguf.pruning.protection import protection_notes
    from reap2gguf.pruning.select import choose_target

    checkpoint, model = changes.checkpoint, opened.model
    method, protection = wanted.method, wanted.protection
    target = choose_target(model.facts, wanted.keep_experts, wanted.compression)
    size = changes.group_size or GROUP_SIZE
    protected = check_merge(checkpoint, model, method, target, protection, size)
    rows = rows_of(opened, changes.calibration, shown)
    from reap2gguf.building.merge_folder import MergeWork, merged_beside

    work = MergeWork(method, target, size, protected.all, rows, changes.compute)
    with merged_beside(changes.output, checkpoint, model, work, shown) as (view, record):
        notes = tuple(protection_notes(protected, protection))
        counts = target.n_experts, target.n_kept
        yield view, Selection(method, *counts, view.kept, notes, protected.all), record
