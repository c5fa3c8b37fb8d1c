"""New matrices of experts as the tensors that the pruned checkpoint stores them in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from reap2gguf.observing.loader import TORCH_TYPES

if TYPE_CHECKING:
    from reap2gguf.models.description import Projection, Slab
    from reap2gguf.pruning.layer_files import Replaced
    from reap2gguf.pruning.view import PrunedView


def new_tensors(
    pruned: PrunedView, layer: int, matrices: Mapping[Projection, Mapping[int, Tensor]]
) -> Replaced:
    """The stored tensors that hold any of the new matrices; all else in them is the source's.

    matrices: by projection and by the expert's number in the pruned model, (rows, columns). They
    are rounded to the type that is stored. Experts are one tensor each or fused, with or without
    other projections, and fused ones may be stored transposed.
    """
    values: dict[str, Tensor] = {}
    for projection, tensor in pruned.model.expert_tensors(layer, pruned.tensors).items():
        for expert, matrix in matrices.get(projection, {}).items():
            slab = tensor.slabs[expert]
            if slab.stored not in values:
                values[slab.stored] = _read(pruned, slab.stored)
            _place(values[slab.stored], slab, matrix)
    return {
        name: (pruned.tensors[name], whole.reshape(-1).view(torch.uint8).numpy())
        for name, whole in values.items()
    }


def _read(pruned: PrunedView, name: str) -> Tensor:
    stored = pruned.tensors[name]
    content = np.empty(stored.n_bytes, np.uint8)
    pruned.read_bytes(name, 0, content)
    return torch.from_numpy(content).view(TORCH_TYPES[stored.dtype]).view(stored.shape)


def _place(whole: Tensor, slab: Slab, matrix: Tensor) -> None:
    """Put a matrix where its slab is."""
    place = whole if slab.index is None else whole[slab.index]
    if slab.transposed:
        place = place.T
    first, last = slab.rows or (0, place.shape[0])
    begin, end = slab.columns or (0, place.shape[1])
    place[first : last : slab.step, begin:end].copy_(matrix)
