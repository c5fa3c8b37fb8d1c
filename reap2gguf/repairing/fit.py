"""What a layer's repair came to, as its file and the manifest have it."""

from __future__ import annotations

from dataclasses import dataclass

from reap2gguf.pruning.layer_facts import Facts


@dataclass(frozen=True)
class LayerFit(Facts):
    """What a layer's repair came to."""

    alpha: float | None  # None: the layer keeps its weights
    # errors on the rows that were held out, relative to the target: sqrt(|E|^2 / |T|^2)
    error_before: float
    error_after: float  # of weights as they are stored
    n_fitted: int  # tokens
    n_held_out: int
