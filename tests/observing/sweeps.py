"""Sweeps over tiny checkpoints, for several test files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.models.contract import MoeModel
from reap2gguf.models.table import describe
from reap2gguf.observing.observer import LayerObserver
from reap2gguf.observing.sweep import SweepReport, sweep
from reap2gguf.options import ComputeOptions
from reap2gguf.progress import Silent

Observer = TypeVar("Observer", bound=LayerObserver)
CPU = ComputeOptions(device="cpu", dtype="float32", threads=2)


class Listener(Silent):
    """A Progress that keeps the notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def rows_of(*lengths: int, seed: int = 0) -> list[np.ndarray]:
    """Rows of random tokens."""
    generator = np.random.default_rng(seed)
    return [generator.integers(0, 500, length) for length in lengths]


def run_sweep(
    kind: Callable[[MoeModel], Observer],
    folder: Path,
    rows: Sequence[np.ndarray],
    options: ComputeOptions = CPU,
    probe: Sequence[np.ndarray] = (),
    listener: Silent | None = None,
) -> tuple[Observer, SweepReport]:
    """One sweep over the checkpoint in `folder`: its observer and its report."""
    with Checkpoint.open(folder) as checkpoint:
        model = describe(checkpoint)
        observer = kind(model)
        progress = listener or Silent()
        report = sweep(checkpoint, model, rows, observer, options, "test", progress, probe)
    return observer, report
