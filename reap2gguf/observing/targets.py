"""Which stored bytes make up a decoder layer's weights under transformers' names."""

from __future__ import annotations

import math

import torch

from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.models.contract import MoeModel
from reap2gguf.models.description import Expert, GgufTensor, Projection
from reap2gguf.observing.loader import Piece, Target, stored_type


def whole(checkpoint: Checkpoint, name: str, dtype: torch.dtype) -> Target:
    """One stored tensor as it is."""
    stored = checkpoint.tensors[name]
    piece = Piece(name, stored_type(checkpoint, name), 0, stored.n_elements, 0)
    return Target(stored.shape, dtype, (piece,))


def layer_targets(
    checkpoint: Checkpoint, model: MoeModel, index: int, dtype: torch.dtype, widen_experts: bool
) -> dict[str, Target]:
    """Everything in layer `index`, experts fused to 3D.

    `dtype` is that of the weights; experts that are not widened keep the type they are stored in.
    """
    prefix = model.block_prefix(index)
    targets: dict[str, Target] = {}
    has_experts = False
    for name in checkpoint.tensors:
        if name.startswith(prefix):
            if isinstance(model.role(name), Expert):
                has_experts = True
            else:
                targets[name.removeprefix(prefix)] = whole(checkpoint, name, dtype)
    if has_experts:
        base = model.experts_path(index)
        tensors = model.expert_tensors(index, checkpoint.tensors)
        groups: dict[str, tuple[Projection, ...]] = {"gate_up": ("gate", "up"), "down": ("down",)}
        for group, projections in groups.items():
            chosen = tuple(tensors[projection] for projection in projections)
            fused = _fused(checkpoint, chosen, None if not widen_experts else dtype)
            targets[f"{base}.{group}_proj"] = fused
    return targets


def _fused(
    checkpoint: Checkpoint, tensors: tuple[GgufTensor, ...], dtype: torch.dtype | None
) -> Target:
    """(E, 2F, H) for gate and up, (E, H, F) for down, from however they are stored."""
    n_experts, rows, columns = tensors[0].shape
    pieces = []
    for position, tensor in enumerate(tensors):
        for expert, slab in enumerate(tensor.slabs):
            stored = checkpoint.tensors[slab.stored]
            matrix = 0 if slab.index is None else slab.index * math.prod(stored.shape[1:])
            first = matrix + (slab.rows[0] if slab.rows else 0) * columns
            place = (expert * len(tensors) + position) * rows * columns
            kind = stored_type(checkpoint, slab.stored)
            byte = first * kind.itemsize
            pieces.append(Piece(slab.stored, kind, byte, rows * columns, place))
    shape = (n_experts, rows * len(tensors), columns)
    kinds = {piece.dtype for piece in pieces}
    kept = kinds.pop() if len(kinds) == 1 else torch.float32  # which holds BF16 and F16 exactly
    return Target(shape, dtype or kept, tuple(pieces))
