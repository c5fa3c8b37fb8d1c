"""How strictly the values of a GGUF file are compared with the weights that it was made from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gguf import GGMLQuantizationType

if TYPE_CHECKING:
    from reap2gguf.gguf_files.imatrix import Imatrix

# Quantized as quickly as they are read, and by no importance matrix: always compared by bytes.
EXACT_TYPES = frozenset(
    GGMLQuantizationType[name] for name in ("F32", "F16", "BF16", "Q8_0", "MXFP4")
)

SMALL_FILE = 2**30  # bytes; quantized again in some minutes on any machine


@dataclass(frozen=True)
class Exactness:
    """Which tensors are quantized again and compared byte for byte; the rest have bounds per row.

    EXACT_TYPES are always compared by bytes. With `every_type` all are, which takes as long as the
    export did. What was quantized with an importance matrix needs the same matrix again: `imatrix`
    is that of the bundle. Pass it without `every_type` too: rows that are hard to bound are then
    quantized again. `ggml` is the version of libggml that the manifest names (`Ggml.label`):
    another one here may round otherwise, and a violation says so.
    """

    every_type: bool = False
    imatrix: Imatrix | None = None
    ggml: str | None = None


WITHIN_BOUNDS = Exactness()
