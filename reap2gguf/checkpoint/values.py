"""Values as they are stored, and what they are as numbers."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from reap2gguf.errors import CheckpointError

# BF16 has no numpy type: its bits travel as uint16.
NUMPY_TYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "U64": "<u8",
    "I32": "<i4", "U32": "<u4", "I16": "<i2", "U16": "<u2", "I8": "<i1", "U8": "<u1",
    "BOOL": "<u1", "F8_E4M3": "<u1", "F8_E5M2": "<u1",
}  # fmt: skip


def to_float32(raw: npt.NDArray[np.generic], dtype: str, name: str) -> npt.NDArray[np.float32]:
    """Stored F32, F16 or BF16 values as float32; CheckpointError for any other dtype."""
    if dtype == "F32":
        return raw.astype(np.float32, copy=False)
    if dtype == "F16":
        return raw.astype(np.float32)
    if dtype == "BF16":
        # bfloat16 is the upper half of a float32
        widened = raw.astype(np.uint32)
        widened <<= 16
        return widened.view(np.float32)
    raise CheckpointError(
        f"tensor {name!r} is stored as {dtype}; F32, F16 and BF16 are read (dequantize it first)"
    )
