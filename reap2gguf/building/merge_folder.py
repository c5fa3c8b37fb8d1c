"""A merge on its own, beside a folder that `prune` writes: what it does first by --method ream."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from reap2gguf.building.merge_record import merge_record_of
from reap2gguf.building.work_beside import work_beside
from reap2gguf.merging.folder import MergeFolder, view_of

if TYPE_CHECKING:
    from reap2gguf.artifacts.texts import ObservationRows
    from reap2gguf.bundle.records import MergeRecord
    from reap2gguf.checkpoint.checkpoint import Checkpoint
    from reap2gguf.models.contract import MoeModel
    from reap2gguf.options import ComputeOptions
    from reap2gguf.progress import Progress
    from reap2gguf.pruning.select import Kept, Target
    from reap2gguf.pruning.view import PrunedView


@dataclass(frozen=True)
class MergeWork:
    """What a merge is made of."""

    method: str  # ream or hc_smoe
    target: Target
    group_size: int
    protected: Kept
    rows: ObservationRows
    compute: ComputeOptions


@contextmanager
def merged_beside(
    folder: Path, checkpoint: Checkpoint, model: MoeModel, work: MergeWork, progress: Progress
) -> Iterator[tuple[PrunedView, MergeRecord]]:
    """The merged model and its record, for as long as the context is open.

    The new weights wait in a hidden folder beside `folder`, from which an interrupted call resumes.
    It is removed when the context ends without an error. Raises what `merge` raises.
    """
    from reap2gguf.merging.layer import MergeSpec
    from reap2gguf.merging.sweep import merge  # loads torch

    key = _key(checkpoint, model, work)
    with work_beside(folder, "merge", key, work.compute) as (layers, options):
        files = MergeFolder(layers, key)
        spec = MergeSpec(work.method, work.target, work.group_size, work.protected)
        found = merge(checkpoint, model, work.rows.rows, spec, files, options, progress)
        with closing(view_of(checkpoint, model, found, files)) as view:
            how = work.method, work.group_size, model
            yield view, merge_record_of(*how, work.rows, found, len(view.replaced))


def _key(checkpoint: Checkpoint, model: MoeModel, work: MergeWork) -> str:
    compute = work.compute
    inputs = (
        checkpoint.fingerprint(),
        checkpoint.stamps(),
        model.facts.mtp_layer,
        work.method,
        work.target.n_kept,
        work.group_size,
        sorted(work.protected.items()),
        work.rows.sha256,
        compute.likely_device,
        compute.likely_dtype,
    )
    return hashlib.sha256(repr(inputs).encode()).hexdigest()
