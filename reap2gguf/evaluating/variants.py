"""The variants of a model that are evaluated together, and where their weights are read from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from reap2gguf.bundle.evaluation import Kind
    from reap2gguf.checkpoint.weights import Weights
    from reap2gguf.models.contract import MoeModel


@dataclass(frozen=True)
class Variant:
    """A model in one form: its weights, and what an architecture says of them.

    `weights` of a pruned model may be a `PrunedView` of another variant's weights, and those of a
    GGUF file are a `GgufWeights`. All variants have the same layers and the same tokens.
    """

    name: str
    kind: Kind
    weights: Weights
    model: MoeModel
    n_bytes: int  # of its files
    bits_per_weight: float
    identity: str = ""  # changes when its files change; progress is kept for it alone
    path: Path | None = None  # its folder or (first) file; None: nothing whole on this machine
