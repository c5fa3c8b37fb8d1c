"""What the tests of the compiled kernels share."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from gguf import GGMLQuantizationType

from reap2gguf.ggml import load_ggml
from reap2gguf.quantizing.kernels.codebooks import codebook
from reap2gguf.quantizing.kernels.compiled import Kernels, load_kernels
from reap2gguf.quantizing.kernels.compiling import machine

Floats = npt.NDArray[np.float32]

needs_kernels = pytest.mark.skipif(
    load_kernels() is None or machine() != "x86_64",
    reason="no kernels for this machine, or a libggml that rounds otherwise",
)


def kernels() -> Kernels:
    """The compiled kernels of this machine."""
    loaded = load_kernels()
    assert loaded is not None
    return loaded


def odd_rows(
    rows: Floats, tensor_type: GGMLQuantizationType, weights: Floats | None
) -> npt.NDArray[np.bool_]:
    """Which rows are odd; the bytes of all others are libggml's, or an assertion fails."""
    book = codebook(load_ggml(), tensor_type)
    tables = None if book is None else book.pointers()
    found, is_odd = kernels().quantize(rows, tensor_type, weights, tables)
    if not is_odd.all():
        wanted = load_ggml()._quantize(rows[~is_odd], tensor_type, weights)
        is_wrong = (found[~is_odd] != wanted).any(axis=1)
        assert not is_wrong.any(), f"rows {np.flatnonzero(~is_odd)[is_wrong]}"
    return is_odd
