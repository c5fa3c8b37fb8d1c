"""Building blocks for architecture files: GGUF tensors from stored ones."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from reap2gguf.checkpoint.safetensors_header import StoredTensor
from reap2gguf.errors import CheckpointError
from reap2gguf.models.description import (
    GgufTensor,
    ModelFacts,
    Projection,
    Slab,
    Transform,
)

PROJECTIONS: tuple[Projection, ...] = ("gate", "up", "down")


def single(
    stored: Mapping[str, StoredTensor],
    name: str,
    gguf_name: str,
    always_f32: bool = False,
    transform: Transform | None = None,
    shape: tuple[int, ...] | None = None,
) -> GgufTensor:
    """A GGUF tensor that is one stored tensor; vectors, norms and what is no weight stay F32.

    `shape` is given where the transform changes it. Raises CheckpointError if it is not stored.
    """
    if name not in stored:
        raise CheckpointError(f"tensor {name!r} is missing from the checkpoint")
    shape = shape or stored[name].shape
    norm = gguf_name.endswith("_norm.weight")
    pinned = always_f32 or len(shape) < 2 or norm or not gguf_name.endswith(".weight")
    return GgufTensor(gguf_name, shape, (Slab(name),), always_f32=pinned, transform=transform)


def expert_tensor(
    stored: Mapping[str, StoredTensor],
    base: str,
    gguf_name: str,
    projection: Projection,
    facts: ModelFacts,
) -> GgufTensor:
    """The E matrices of one projection: gate and up (E, F, H), down (E, H, F).

    `base` is the path of a layer's experts; below it lie one tensor an expert, or fused
    `gate_up_proj` (E, 2F, H) and `down_proj` (E, H, F). Raises CheckpointError if neither fits.
    """
    width, hidden, count = facts.expert_width, facts.hidden_size, facts.n_experts
    matrix = (hidden, width) if projection == "down" else (width, hidden)
    fused = _fused_name(stored, base, "down" if projection == "down" else "gate_up")
    if fused is None:
        slabs = tuple(Slab(f"{base}.{e}.{projection}_proj.weight") for e in range(count))
        expected: tuple[int, ...] = matrix
    else:
        # gate_up_proj holds the gate's rows, then the up's
        rows = {"gate": (0, width), "up": (width, 2 * width)}.get(projection)
        slabs = tuple(Slab(fused, index=e, rows=rows) for e in range(count))
        expected = (count, hidden, width) if rows is None else (count, 2 * width, hidden)
    for slab in slabs:
        _check_shape(stored, slab.stored, expected)
    return GgufTensor(gguf_name, (count, *matrix), slabs)


def add_one(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Norms stored around zero, as llama.cpp wants them: around one."""
    return values + np.float32(1)


def _fused_name(stored: Mapping[str, StoredTensor], base: str, projection: str) -> str | None:
    """The 3D tensor of a projection, with or without `.weight`; None where experts are 2D."""
    for name in (f"{base}.{projection}_proj", f"{base}.{projection}_proj.weight"):
        if name in stored:
            return name
    return None


def _check_shape(stored: Mapping[str, StoredTensor], name: str, expected: tuple[int, ...]) -> None:
    if name not in stored:
        raise CheckpointError(f"tensor {name!r} is missing from the checkpoint")
    if stored[name].shape != expected:
        raise CheckpointError(
            f"tensor {name!r}: shape {list(stored[name].shape)}, expected {list(expected)}"
        )
