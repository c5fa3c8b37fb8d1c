"""Repairs of tiny checkpoints, for several test files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.models.table import describe
from reap2gguf.options import ComputeOptions
from reap2gguf.progress import Silent
from reap2gguf.pruning.view import PrunedView
from reap2gguf.repairing.record import RepairedLayer, RepairFolder
from reap2gguf.repairing.sweep import repair

CPU = ComputeOptions(device="cpu", dtype="float32", threads=2)


def rows_of(count: int = 32, length: int = 48, seed: int = 0) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [generator.integers(0, 500, length) for _ in range(count)]


@contextmanager
def pruned_view(folder: Path, step: int = 2) -> Iterator[PrunedView]:
    """The model in a folder with every second expert of each layer, or every one."""
    with Checkpoint.open(folder) as checkpoint:
        model = describe(checkpoint)
        total = model.facts.n_experts
        kept = {layer: tuple(range(step - 1, total, step)) for layer in model.facts.moe_layers}
        yield PrunedView(checkpoint, model, kept)


def repaired(
    view: PrunedView,
    path: Path,
    rows: list[np.ndarray] | None = None,
    kind: Any = "ridge",
    options: ComputeOptions = CPU,
    way: str | None = None,
    key: str = "key",
) -> tuple[dict[int, RepairedLayer], RepairFolder]:
    folder = RepairFolder(path, key)
    found = repair(view, rows_of() if rows is None else rows, kind, folder, options, Silent(), way)
    return found, folder


def files(folder: RepairFolder) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.path.iterdir())}


def values(stored: Checkpoint) -> dict[str, torch.Tensor]:
    """All tensors of files, as float32."""
    return {name: torch.from_numpy(stored.read_float32(name)) for name in stored.tensors}
