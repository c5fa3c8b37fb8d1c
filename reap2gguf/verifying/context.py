"""What the checks of one bundle share: its manifest, how strict they are, and what they found."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.checkpoint.weights import Weights
from reap2gguf.models.contract import MoeModel
from reap2gguf.verifying.hf_folder import open_folder
from reap2gguf.verifying.report import Findings

if TYPE_CHECKING:
    from reap2gguf.bundle.manifest import Manifest
    from reap2gguf.progress import Progress
    from reap2gguf.verifying.against_source import OpenSource

Opened = tuple[Checkpoint, MoeModel]
Reference = tuple[Weights, MoeModel]  # the weights that GGUF files were made from


@dataclass(frozen=True)
class Strictness:
    """How strictly to compare, and with what."""

    is_exact: bool = False  # every type is quantized again and compared byte for byte
    source: OpenSource | None = None  # the model that was pruned
    reads_values: bool = True  # without it, hashes and headers are read, and no tensor


@dataclass
class Check:
    """One verification of a bundle that is running."""

    manifest: Manifest
    strictness: Strictness
    n_threads: int
    progress: Progress
    found: Findings = field(default_factory=Findings)

    def take(self, violations: Iterator[str], where: str) -> None:
        """`Findings.take`."""
        self.found.take(violations, where)


@contextmanager
def opened_folder(folder: Path) -> Iterator[tuple[Opened | None, list[str]]]:
    """A safetensors folder with its model, None if it cannot be read; and the violations."""
    checkpoint, model, violations = open_folder(folder)
    if checkpoint is None:
        yield None, violations
        return
    with checkpoint:
        yield None if model is None else (checkpoint, model), violations
