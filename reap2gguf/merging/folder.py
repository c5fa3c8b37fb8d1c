"""The files of a merge: each layer's new matrices, and which experts became one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from reap2gguf.merging.merge import LayerMerge
from reap2gguf.pruning.layer_files import LayerFiles, MadeLayer, identity_of
from reap2gguf.pruning.replaced import ReplacedView
from reap2gguf.pruning.view import PrunedView

if TYPE_CHECKING:
    from reap2gguf.checkpoint.weights import Weights
    from reap2gguf.models.contract import MoeModel

MergedLayer = MadeLayer[LayerMerge]


class MergeFolder(LayerFiles[LayerMerge]):
    """The files of a merge; that of a multi-token-prediction block has no tensors."""

    def __init__(self, path: Path, key: str) -> None:
        super().__init__(path, key, LayerMerge)


def kept_of(layers: Mapping[int, MergedLayer]) -> dict[int, tuple[int, ...]]:
    """The experts of each layer that stay."""
    return {layer: one.facts.kept for layer, one in layers.items()}


def view_of(
    weights: Weights, model: MoeModel, layers: Mapping[int, MergedLayer], folder: MergeFolder
) -> ReplacedView:
    """The merged model, whose files the caller closes. Raises what opening them raises."""
    pruned = PrunedView(weights, model, kept_of(layers))
    return ReplacedView(pruned, folder.open(layers), None, identity_of(layers.values()))
