"""Which stored bytes make up a decoder layer's weights under transformers' names."""

from __future__ import annotations

import math

import torch

from reap2gguf.checkpoint.weights import Weights
from reap2gguf.models.contract import MoeModel
from reap2gguf.models.description import Expert, GgufTensor, Projection
from reap2gguf.observing.loader import ByteRun, Target, stored_type


def whole(weights: Weights, name: str, dtype: torch.dtype) -> Target:
    """One stored tensor as it is."""
    stored = weights.tensors[name]
    run = ByteRun(name, stored_type(weights, name), 0, stored.n_elements, 0)
    return Target(stored.shape, dtype, (run,))


def layer_targets(
    weights: Weights, model: MoeModel, index: int, dtype: torch.dtype, widen_experts: bool
) -> dict[str, Target]:
    """Everything in layer `index`, experts fused to 3D.

    `dtype` is that of the weights. Experts that are not widened keep the type they are stored in.
    """
    prefix = model.block_prefix(index)
    targets: dict[str, Target] = {}
    has_experts = False
    for name in weights.tensors:
        if name.startswith(prefix):
            if isinstance(model.role(name), Expert):
                has_experts = True
            else:
                targets[name.removeprefix(prefix)] = whole(weights, name, dtype)
    if has_experts:
        base = model.experts_path(index)
        tensors = model.expert_tensors(index, weights.tensors)
        groups: dict[str, tuple[Projection, ...]] = {"gate_up": ("gate", "up"), "down": ("down",)}
        for group, projections in groups.items():
            chosen = tuple(tensors[projection] for projection in projections)
            fused = _fused(weights, chosen, None if not widen_experts else dtype)
            targets[f"{base}.{group}_proj"] = fused
    return targets


def _fused(weights: Weights, tensors: tuple[GgufTensor, ...], dtype: torch.dtype | None) -> Target:
    """(E, 2F, H) for gate and up, (E, H, F) for down, from however they are stored."""
    n_experts, rows, columns = tensors[0].shape
    runs = []
    for position, tensor in enumerate(tensors):
        for expert, slab in enumerate(tensor.slabs):
            stored = weights.tensors[slab.stored]
            matrix = 0 if slab.index is None else slab.index * math.prod(stored.shape[1:])
            first = matrix + (slab.rows[0] if slab.rows else 0) * columns
            start = (expert * len(tensors) + position) * rows * columns
            stored_as = stored_type(weights, slab.stored)
            byte = first * stored_as.itemsize
            runs.append(ByteRun(slab.stored, stored_as, byte, rows * columns, start))
    shape = (n_experts, rows * len(tensors), columns)
    types = {run.dtype for run in runs}
    common = types.pop() if len(types) == 1 else torch.float32  # which holds BF16 and F16 exactly
    return Target(shape, dtype or common, tuple(runs))
