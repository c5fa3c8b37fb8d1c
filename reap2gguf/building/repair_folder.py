"""A repair on its own, beside a folder that `prune` writes: what `prune --repair` does first."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from reap2gguf.building.repair_record import record_of
from reap2gguf.building.work_beside import work_beside
from reap2gguf.pruning.replaced import ReplacedView
from reap2gguf.repairing.limits import repaired_layers
from reap2gguf.repairing.record import RepairFolder

if TYPE_CHECKING:
    from reap2gguf.artifacts.texts import ObservationRows
    from reap2gguf.bundle.records import RepairRecord
    from reap2gguf.checkpoint.checkpoint import Checkpoint
    from reap2gguf.options import ComputeOptions
    from reap2gguf.progress import Progress
    from reap2gguf.pruning.view import PrunedView
    from reap2gguf.repairing.layer import RepairKind


@dataclass(frozen=True)
class RepairWork:
    """What a repair is made of."""

    kind: str  # ridge or scale
    rows: ObservationRows
    compute: ComputeOptions


@contextmanager
def repaired_beside(
    folder: Path, pruned: PrunedView, checkpoint: Checkpoint, work: RepairWork, progress: Progress
) -> Iterator[tuple[PrunedView, RepairRecord]]:
    """The repaired model and its record, for as long as the context is open.

    The new weights wait in a hidden folder beside `folder`, from which an interrupted call resumes.
    It is removed when the context ends without an error. Raises what `repair` raises.
    """
    from reap2gguf.repairing.sweep import repair  # loads torch

    key = _key(pruned, checkpoint, work)
    with work_beside(folder, "repair", key, work.compute) as (layers, options):
        files, kind = RepairFolder(layers, key), cast("RepairKind", work.kind)
        found = repair(pruned, work.rows.rows, kind, files, options, progress)
        view = ReplacedView(pruned, files.open(repaired_layers(pruned.model)))
        with closing(view):
            yield view, record_of(work.kind, work.rows, found, len(view.replaced))


def _key(pruned: PrunedView, checkpoint: Checkpoint, work: RepairWork) -> str:
    compute = work.compute
    inputs = (
        checkpoint.fingerprint(),
        sorted(pruned.kept.items()),
        work.kind,
        work.rows.sha256,
        compute.likely_device,
        compute.likely_dtype,
    )
    return hashlib.sha256(repr(inputs).encode()).hexdigest()
