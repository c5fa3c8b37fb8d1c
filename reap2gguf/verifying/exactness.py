"""How strictly the values of a GGUF file are compared with the weights that it was made from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from reap2gguf.gguf_files.imatrix import Imatrix


@dataclass(frozen=True)
class Exactness:
    """Which tensors are quantized again and compared byte for byte; the rest have bounds per row.

    Types that are cheap to make again (F32, F16, BF16, Q8_0) are always compared by bytes. With
    `every_type` all are, which takes as long as the export did. What was quantized with an
    importance matrix needs the same matrix again: `imatrix` is that of the bundle. `ggml` is the
    version of libggml that the manifest names, for the message about bytes that differ.
    """

    every_type: bool = False
    imatrix: Imatrix | None = None
    ggml: str | None = None


WITHIN_BOUNDS = Exactness()
