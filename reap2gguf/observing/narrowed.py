"""A layer's weights with fewer experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from reap2gguf.observing.loader import Tensors


@torch.no_grad()  # a module takes no tensors of inference mode as its parameters
def narrowed(
    tensors: Tensors, shapes: Mapping[str, torch.Size], kept: Sequence[int], in_place: bool
) -> Tensors:
    """A layer's weights with some of its experts.

    `shapes` are those of the result; where one differs, its axis is that of the experts. In place
    they move to the front of the memory that they are in: `kept` ascends, so none is overwritten
    before it has moved.
    """
    found: Tensors = {}
    for name, tensor in tensors.items():
        if tensor.shape == shapes[name]:
            found[name] = tensor
            continue
        pairs = zip(tensor.shape, shapes[name], strict=True)
        axis = next(axis for axis, (before, after) in enumerate(pairs) if before != after)
        if not in_place:
            found[name] = tensor.index_select(axis, torch.tensor(kept, device=tensor.device))
            continue
        for new, old in enumerate(kept):
            if new != old:
                tensor.select(axis, new).copy_(tensor.select(axis, old))
        found[name] = tensor.narrow(axis, 0, len(kept))
    return found
