"""The repair that `prune` makes, from its options."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from reap2gguf.artifacts.texts import ObservationRows
    from reap2gguf.bundle.records import RepairRecord
    from reap2gguf.hub.opened import OpenModel
    from reap2gguf.options import CalibrationOptions, ComputeOptions
    from reap2gguf.progress import Progress
    from reap2gguf.pruning.view import PrunedView


def repaired_model(
    opened: OpenModel,
    pruned: PrunedView,
    output: Path,
    how: tuple[str, CalibrationOptions, ComputeOptions],
    shown: Progress,
) -> AbstractContextManager[tuple[PrunedView, RepairRecord]]:
    """The repaired model; `how` is the kind of repair, its text, and where it is computed."""
    from reap2gguf.repairing.limits import check_repair, check_rows

    kind, options, compute = how
    check_repair(pruned.source, opened.model, pruned.n_kept < opened.model.facts.n_experts)
    rows = rows_of(opened, options, shown)
    check_rows(len(rows.rows))
    from reap2gguf.building.repair_folder import RepairWork, repaired_beside

    work = RepairWork(kind, rows, compute)
    return repaired_beside(output, pruned, opened.checkpoint, work, shown)


def rows_of(opened: OpenModel, options: CalibrationOptions, shown: Progress) -> ObservationRows:
    """The rows of the calibration. Raises CalibrationError, and what a tokenizer raises."""
    from reap2gguf.api.texts import calibration_rows
    from reap2gguf.calibration.scanned_files import ScannedFiles
    from reap2gguf.calibration.sources import check_calibration
    from reap2gguf.calibration.spec import decide

    decided, files = decide(options), ScannedFiles()
    check_calibration(decided, files)
    return calibration_rows(opened, decided, files, shown)
