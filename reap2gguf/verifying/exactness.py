"""How strictly the values of a GGUF file are compared with the weights that it was made from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gguf import GGMLQuantizationType

if TYPE_CHECKING:
    from reap2gguf.gguf_files.imatrix import Imatrix

# Quantized as quickly as they are read, and by no importance matrix: always compared by bytes.
EXACT_TYPES = frozenset(
    GGMLQuantizationType[name]
    for name in ("F32", "F16", "BF16", "Q8_0", "MXFP4", "NVFP4", "TQ1_0", "TQ2_0")
)
# Those, and the types that the compiled kernels make in at most 12 ns a weight. The types that
# remain have codebooks, and take 27 to 70 ns, or are made by libggml.
QUICK_TYPES = EXACT_TYPES | {
    GGMLQuantizationType[name]
    for name in (
        *("Q6_K", "Q5_K", "Q5_1", "Q5_0", "Q4_K", "Q4_1", "Q4_0"),
        *("Q3_K", "Q2_K", "IQ4_NL", "IQ4_XS"),
    )
}

SMALL_FILE = 2**30  # bytes; quantized again in some minutes on any machine


@dataclass(frozen=True)
class Exactness:
    """Which tensors must have the bytes that quantizing again makes; the rest have bounds per row.

    EXACT_TYPES must always. With `every_type` all must, which takes as long as the export did. What
    was quantized with an importance matrix needs the same matrix again: `imatrix` is that of the
    bundle. Where it is known, or none was used, QUICK_TYPES are made again too, if a compiled
    kernel makes them: equal bytes are exact, and others must be within the bounds. Without
    `tries_bytes` they are not, as for a file of another program. `ggml` is the version of libggml
    that the manifest names (`Ggml.label`): another one here may round otherwise, and a violation
    says so.
    """

    every_type: bool = False
    imatrix: Imatrix | None = None
    ggml: str | None = None
    tries_bytes: bool = True


WITHIN_BOUNDS = Exactness(tries_bytes=False)
