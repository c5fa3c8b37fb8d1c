"""How far a matrix of a GGUF file is from the one that was stored, and how far it may be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from gguf import GGMLQuantizationType

from reap2gguf.checkpoint.weights import Weights
from reap2gguf.ggml import Ggml
from reap2gguf.gguf_files.reader import GgufHeader
from reap2gguf.gguf_files.rows import read_rows, row_ranges, rows_per_matrix

if TYPE_CHECKING:
    from reap2gguf.checkpoint.weights import Floats, Weights
    from reap2gguf.ggml import Ggml
    from reap2gguf.gguf_files.reader import GgufHeader
    from reap2gguf.models.description import GgufTensor, Slab

# Largest relative error |read - stored| / |stored| of a matrix, by type: about two and a half
# times what trained weights show. Another expert's weights stand at about 1.4.
ERROR_BOUNDS = {
    "F32": 0.0,
    "F16": 0.001,
    "BF16": 0.004,
    "Q8_0": 0.02,
    "Q6_K": 0.05,
    "Q5_K": 0.1,
    "Q5_0": 0.12,
    "Q5_1": 0.12,
    "Q4_K": 0.2,
    "Q4_0": 0.22,
    "Q4_1": 0.22,
    "IQ4_XS": 0.2,
    "IQ4_NL": 0.2,
    "Q3_K": 0.4,
    "IQ3_S": 0.4,
    "IQ3_XXS": 0.5,
    "Q2_K": 0.7,
    "IQ2_S": 0.7,
    "IQ2_XS": 0.75,
    "IQ2_XXS": 0.8,
    "MXFP4": 0.3,
    "IQ1_M": 0.9,
    "IQ1_S": 0.9,
}

# Blocks of few bits hold no zeros: a sparse matrix beyond its type's bound is still sound if
# quantizing it again errs nearly as much.
_SLACK = 1.2
_SPARSE = 0.5  # share of zeros


@dataclass(frozen=True)
class MatrixError:
    """How far a matrix is from what is stored: norms of the difference and of the stored."""

    distance: float
    scale: float
    zeros_only: bool

    @property
    def relative(self) -> float:
        return self.distance / self.scale if self.scale else self.distance


def matrix_error(
    header: GgufHeader,
    ggml: Ggml,
    weights: Weights,
    tensor: GgufTensor,
    index: int,
    slab: Slab,
) -> MatrixError:
    """Compare matrix `index` of a tensor with a slab, a range of rows at a time."""
    tensor_type = header.tensors[tensor.name].tensor_type
    begin = index * rows_per_matrix(tensor)
    distance = scale = 0.0
    zeros_only = True
    for first, last in row_ranges(tensor):
        values = ggml.dequantize(header.read(tensor.name, begin + first, begin + last), tensor_type)
        stored = read_rows(weights, tensor, slab, first, last)
        zeros_only = zeros_only and not values.any()
        with np.errstate(over="ignore", invalid="ignore"):  # what overflows is a violation
            distance += float(np.square(values - stored, dtype=np.float64).sum())
            scale += float(np.square(stored, dtype=np.float64).sum())
    return MatrixError(distance**0.5, scale**0.5, zeros_only)


def errs_as_its_type(
    ggml: Ggml, stored: Floats, tensor_type: GGMLQuantizationType, error: float
) -> bool:
    """Whether a matrix is sparse, such as an identity, and the error is that of its type."""
    if np.count_nonzero(stored) > _SPARSE * stored.size:
        return False
    even = np.ones(stored.shape[-1], dtype=np.float32)
    again = ggml.dequantize(ggml.quantize(stored, tensor_type, even), tensor_type)
    return error <= _SLACK * relative_error(again, stored)


def likely_slab(
    header: GgufHeader,
    ggml: Ggml,
    weights: Weights,
    tensor: GgufTensor,
    index: int,
    bound: float,
) -> int | None:
    """Which expert's weights matrix `index` holds, when they are not those of its place."""
    for other, slab in enumerate(tensor.slabs):
        error = matrix_error(header, ggml, weights, tensor, index, slab)
        if other != index and error.relative <= bound:
            return other
    return None


def relative_error(values: Floats, stored: Floats) -> float:
    scale = float(np.linalg.norm(stored))
    distance = float(np.linalg.norm(values - stored))
    return distance / scale if scale else distance
