"""Merges of tiny checkpoints, for several test files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np

from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.merging.folder import MergedLayer, MergeFolder, view_of
from reap2gguf.merging.layer import MergeSpec
from reap2gguf.merging.sweep import merge
from reap2gguf.models.table import describe
from reap2gguf.options import ComputeOptions
from reap2gguf.progress import Progress, Silent
from reap2gguf.pruning.replaced import ReplacedView
from reap2gguf.pruning.select import Kept, choose_target
from tests.repairing.repairs import CPU, rows_of

ROWS = rows_of(12)


def merged(
    source: Path,
    path: Path,
    method: str = "ream",
    *,
    compression: float = 0.5,
    group_size: int = 3,
    protected: Kept | None = None,
    rows: list[np.ndarray] | None = None,
    options: ComputeOptions = CPU,
    progress: Progress | None = None,
) -> dict[int, MergedLayer]:
    """Merge a checkpoint's experts; the files are in `path`."""
    with Checkpoint.open(source) as checkpoint:
        model = describe(checkpoint)
        target = choose_target(model.facts, None, compression)
        spec = MergeSpec(method, target, group_size, protected or {})
        folder = MergeFolder(path, "key")
        used = ROWS if rows is None else rows
        return merge(checkpoint, model, used, spec, folder, options, progress or Silent())


@contextmanager
def merged_view(source: Path, path: Path, layers: dict[int, MergedLayer]) -> Iterator[ReplacedView]:
    """The merged model."""
    with Checkpoint.open(source) as checkpoint:
        view = view_of(checkpoint, describe(checkpoint), layers, MergeFolder(path, "key"))
        with closing(view):
            yield view
