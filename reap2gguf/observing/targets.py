"""Which stored bytes make up a decoder layer's weights under transformers' names."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from reap2gguf.models.description import Expert, GgufTensor, Projection, Slab
from reap2gguf.observing.loader import ByteRun, Columns, Target, stored_type

if TYPE_CHECKING:
    from reap2gguf.checkpoint.weights import Weights
    from reap2gguf.models.contract import MoeModel


def whole(weights: Weights, name: str, dtype: torch.dtype) -> Target:
    """One stored tensor as it is."""
    stored = weights.tensors[name]
    run = ByteRun(name, stored_type(weights, name), 0, stored.n_elements, 0)
    return Target(stored.shape, dtype, (run,))


def _joined(weights: Weights, names: Sequence[str], dtype: torch.dtype) -> Target:
    """Stored tensors one after another on axis 0; of one, the tensor as it is."""
    runs: list[ByteRun] = []
    start = 0
    for name in names:
        stored = weights.tensors[name]
        runs.append(ByteRun(name, stored_type(weights, name), 0, stored.n_elements, start))
        start += stored.n_elements
    if len(names) == 1:
        return Target(weights.tensors[names[0]].shape, dtype, tuple(runs))
    n_rows = sum(weights.tensors[name].shape[0] for name in names)
    return Target((n_rows, *weights.tensors[names[0]].shape[1:]), dtype, tuple(runs))


def rows_of(weights: Weights, name: str, first: int, last: int, dtype: torch.dtype) -> Target:
    """Rows [first, last) of a stored matrix."""
    stored = weights.tensors[name]
    n_columns = stored.shape[-1]
    n_values = (last - first) * n_columns
    run = ByteRun(
        name, stored_type(weights, name), first * n_columns * stored.item_bytes, n_values, 0
    )
    return Target((last - first, n_columns), dtype, (run,))


def names_by_layer(names: Iterable[str], model: MoeModel) -> list[list[str]]:
    """The stored tensors of each layer, in their order; a checkpoint has tens of thousands."""
    layers = [model.block_prefix(index) for index in range(model.facts.n_blocks)]
    numbers = {prefix: index for index, prefix in enumerate(layers)}
    lengths = sorted({len(prefix) for prefix in layers})
    found: list[list[str]] = [[] for _ in layers]
    for name in names:
        for length in lengths:
            index = numbers.get(name[:length])
            if index is not None:
                found[index].append(name)
    return found


def layer_targets(
    weights: Weights,
    model: MoeModel,
    index: int,
    dtype: torch.dtype,
    widen_experts: bool,
    module_dtypes: Mapping[str, torch.dtype] | None = None,
    names: Iterable[str] | None = None,
) -> dict[str, Target]:
    """Everything in layer `index`, experts fused to 3D.

    Weights have `dtype`, or the type that `module_dtypes` has for their parameter: transformers
    keeps some in float32 whatever the model's type, such as a router's bias; and the model may name
    more. Experts that are not widened keep the type they are stored in. `names`: the layer's
    tensors, if they are known.
    """
    prefix = model.block_prefix(index)
    base = model.experts_path(index)
    targets: dict[str, Target] = {}
    joined = model.joined(index)
    has_weights = False
    for name in weights.tensors if names is None else names:
        if not name.startswith(prefix):
            continue
        role = model.role(name)
        if role.layer is None:
            continue  # the MTP block's own embedding and head
        inside = name.removeprefix(prefix)
        parameter = model.parameter(index, inside)
        if not isinstance(role, Expert):
            own = (module_dtypes or {}).get(parameter, dtype)
            own = torch.float32 if model.is_computed_in_f32(index, inside) else own
            parts = joined.get(parameter, (inside,))
            targets[parameter] = _joined(weights, [prefix + part for part in parts], own)
        elif role.part == "bias" or model.module_is_as_stored:
            own = dtype if widen_experts else stored_type(weights, name)
            targets[f"{base}.{_fused_name(parameter)}"] = whole(weights, name, own)
        else:
            has_weights = True
    if has_weights:
        targets |= _expert_targets(weights, model, index, dtype if widen_experts else None)
    return targets


def _expert_targets(
    weights: Weights, model: MoeModel, index: int, dtype: torch.dtype | None
) -> dict[str, Target]:
    """The matrices of all experts of a layer, one 3D target each; None: the stored type."""
    base, tensors = model.experts_path(index), model.expert_tensors(index, weights.tensors)
    return {
        f"{base}.{fused}": _fused(weights, tuple(tensors[one] for one in projections), dtype)
        for fused, projections in _groups(tensors).items()
    }


def expert_target(weights: Weights, tensor: GgufTensor, expert: int, dtype: torch.dtype) -> Target:
    """One projection of one expert, (rows, columns), from however it is stored."""
    _, rows, columns = tensor.shape
    return Target((rows, columns), dtype, tuple(_runs(weights, tensor, tensor.slabs[expert], 0)))


def _groups(tensors: Mapping[Projection, GgufTensor]) -> dict[str, tuple[Projection, ...]]:
    """transformers' fused parameters, and the projections in each."""
    inputs = tuple(projection for projection in tensors if projection != "down")
    name = "up_proj" if inputs == ("up",) else "gate_up_proj"
    return {name: inputs, "down_proj": ("down",)}


def _fused_name(name: str) -> str:
    """A fused tensor's name within its module; on disk it may end in `.weight`."""
    return name.removesuffix(".weight").rpartition(".")[2]


def _fused(weights: Weights, tensors: tuple[GgufTensor, ...], dtype: torch.dtype | None) -> Target:
    """(E, 2F, H) for gate and up, (E, H, F) for down, from however they are stored."""
    n_experts, _, columns = tensors[0].shape
    rows = sum(tensor.shape[1] for tensor in tensors)
    runs: list[ByteRun] = []
    for expert in range(n_experts):
        start = expert * rows * columns
        for tensor in tensors:
            runs += _runs(weights, tensor, tensor.slabs[expert], start)
            start += tensor.shape[1] * columns
    types = {run.dtype for run in runs}
    common = types.pop() if len(types) == 1 else torch.float32  # which holds BF16 and F16 exactly
    return Target((n_experts, rows, columns), dtype or common, tuple(runs))


def _runs(weights: Weights, tensor: GgufTensor, slab: Slab, start: int) -> Iterator[ByteRun]:
    """What one matrix of an expert is read from; it begins at element `start` of the target."""
    stored = weights.tensors[slab.stored]
    dtype = stored_type(weights, slab.stored)
    matrix = 0 if slab.index is None else slab.index * math.prod(stored.shape[1:])
    _, rows, columns = tensor.shape
    first, last = slab.rows or (0, rows)
    if slab.transposed:
        width = stored.shape[-1]
        taken = Columns(width, (first, last, slab.step), columns)
        byte = matrix * dtype.itemsize
        yield ByteRun(slab.stored, dtype, byte, width * columns, start, taken)
    elif slab.step == 1:
        byte = (matrix + first * columns) * dtype.itemsize
        yield ByteRun(slab.stored, dtype, byte, rows * columns, start)
    else:
        for number, row in enumerate(range(first, last, slab.step)):
            byte = (matrix + row * columns) * dtype.itemsize
            yield ByteRun(slab.stored, dtype, byte, columns, start + number * columns)
