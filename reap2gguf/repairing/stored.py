"""New `down_proj` weights as the tensors that the pruned checkpoint stores them in."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from reap2gguf.errors import UnsupportedModelError

if TYPE_CHECKING:
    from reap2gguf.pruning.layer_files import Replaced
    from reap2gguf.pruning.view import PrunedView


def new_tensors(pruned: PrunedView, layer: int, down: Tensor | None) -> Replaced:
    """The stored tensors of a layer's experts, `down` (E, H, F) in their type; none for None.

    Experts are one tensor each or fused, and fused ones may be stored transposed. Raises
    UnsupportedModelError for a layout that is neither.
    """
    if down is None:
        return {}
    matrices: dict[str, dict[int, Tensor]] = {}
    slabs = pruned.model.expert_tensors(layer, pruned.tensors)["down"].slabs
    for slab, matrix in zip(slabs, down, strict=True):
        if slab.rows not in (None, (0, len(matrix))) or slab.step != 1 or slab.columns is not None:
            raise UnsupportedModelError(
                f"tensor {slab.stored!r}: --repair is not defined for a down_proj that shares its "
                "tensor with other matrices; leave it out"
            )
        own = matrix.t() if slab.transposed else matrix
        matrices.setdefault(slab.stored, {})[slab.index or 0] = own.contiguous()
    found: dict[str, tuple[object, object]] = {}
    for name, parts in matrices.items():
        stored = pruned.tensors[name]
        whole = torch.stack([parts[number] for number in sorted(parts)])
        content = whole.contiguous().view(torch.uint8).numpy().reshape(-1)
        assert content.nbytes == stored.n_bytes, f"{name}: {content.nbytes} bytes"
        found[name] = stored, np.ascontiguousarray(content)
    return found  # type: ignore[return-value]
