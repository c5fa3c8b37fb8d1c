"""The values of a side file decide its types: what F16 cannot hold is written as F32.

A projector is written in F16, as llama.cpp's converter does. A tower in BF16 may hold values that
F16 does not have, and llama.cpp multiplies F32 as well. So the values are read once before the
work, in ranges: memory is 16 MiB, and the tower of a 35B model takes about a second.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from reap2gguf.checkpoint.weights import values_of
from reap2gguf.errors import CheckpointError, UnsupportedModelError
from reap2gguf.messages import shown

if TYPE_CHECKING:
    from reap2gguf.checkpoint.weights import Weights
    from reap2gguf.models.contract import MoeModel
    from reap2gguf.models.description import GgufTensor, SideFile

F16_LIMIT = 65520.0  # what rounds to infinity


def side_files(model: MoeModel, weights: Weights) -> tuple[SideFile, ...]:
    """The side files of a model, each tensor with a type that holds all its values.

    Raises what `MoeModel.side_files` and `with_fitting_types` raise.
    """
    sides = model.side_files(weights.folder, weights.tensors)
    return tuple(with_fitting_types(side, weights) for side in sides)


def with_fitting_types(side: SideFile, weights: Weights) -> SideFile:
    """A side file in which tensors with values beyond F16 are written as F32; a note for each.

    Raises CheckpointError for a value that is not finite, and UnsupportedModelError if llama.cpp
    computes with a tensor in F16 whatever its type.
    """
    tensors, notes = [], list(side.notes)
    limits: dict[str, float] = {}  # two frames are one stored tensor
    for tensor in side.tensors:
        name = tensor.slabs[0].stored
        if name not in limits:
            limits[name] = _largest(weights, tensor)
        if tensor.always_f32 or limits[name] < F16_LIMIT:
            tensors.append(tensor)
            continue
        place, _ = weights.origin(name)
        found = f"{shown(place)} holds values up to {limits[name]:g}, beyond F16"
        if tensor.needs_f16:
            raise UnsupportedModelError(
                f"{weights.folder}: {found}; llama.cpp computes with {tensor.name} in F16; scale "
                "the tower's weights"
            )
        notes.append(f"{found}; {tensor.name} is written as F32")
        tensors.append(replace(tensor, always_f32=True))
    return replace(side, tensors=tuple(tensors), notes=tuple(notes), is_checked=True)


def _largest(weights: Weights, tensor: GgufTensor) -> float:
    """The largest magnitude in what a tensor is made of."""
    name = tensor.slabs[0].stored
    largest = 0.0
    for values in values_of(weights, name):
        if values.size:
            found = float(np.abs(values).max())  # NaN if there is one
            largest = found if np.isnan(found) else max(largest, found)
        if not np.isfinite(largest):
            place, _ = weights.origin(name)
            raise CheckpointError(f"{weights.folder}: {place!r} holds NaN or infinite values")
    return largest
