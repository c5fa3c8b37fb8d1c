"""What the checks of one bundle share: its manifest, how strict they are, and what they found."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.checkpoint.weights import Weights
from reap2gguf.models.contract import MoeModel
from reap2gguf.verifying.report import Findings

if TYPE_CHECKING:
    from reap2gguf.bundle.manifest import Manifest
    from reap2gguf.progress import Progress
    from reap2gguf.pruning.view import PrunedView
    from reap2gguf.verifying.against_source import OpenSource

Opened = tuple[Checkpoint, MoeModel]
Reference = tuple[Weights, MoeModel]  # the weights that GGUF files were made from


@dataclass(frozen=True)
class Strictness:
    """How strictly to compare, and with what."""

    is_exact: bool = False  # every type is quantized again and compared byte for byte
    source: OpenSource | None = None  # the model that was pruned
    reads_values: bool = True  # without it, hashes and headers are read, and no tensor
    device: str = "auto"  # what makes blocks again: auto, cpu or cuda


@dataclass(frozen=True)
class PrunedSource:
    """The pruned model as it must be; None if it cannot be made, which `violations` explain."""

    view: PrunedView | None
    violations: tuple[str, ...]
    not_checked: tuple[str, ...] = ()


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
