"""Blocks read by the kernels are libggml's values, bit for bit."""

from __future__ import annotations

import gguf.quants
import numpy as np
import numpy.typing as npt
import pytest
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as T
from hypothesis import given, settings
from hypothesis import strategies as st

from reap2gguf.ggml import load_ggml
from reap2gguf.quantizing.kernels.compiled import Kernels, load_kernels

Bytes = npt.NDArray[np.uint8]

# Where a block keeps its scales, which are halves.
SCALES = {
    T.Q8_0: (0,), T.Q4_0: (0,), T.Q4_1: (0, 2), T.Q5_0: (0,), T.Q5_1: (0, 2),
    T.Q2_K: (80, 82), T.Q3_K: (108,), T.Q4_K: (0, 2), T.Q5_K: (0, 2), T.Q6_K: (208,),
    T.IQ4_NL: (0,), T.IQ4_XS: (0,), T.IQ3_S: (0,), T.IQ3_XXS: (0,),
    T.IQ2_S: (0,), T.IQ2_XS: (0,), T.IQ2_XXS: (0,),
}  # fmt: skip

pytestmark = pytest.mark.skipif(load_kernels() is None, reason="no kernels for this machine")


def kernels() -> Kernels:
    loaded = load_kernels()
    assert loaded is not None
    return loaded


def codebook(tensor_type: T) -> Bytes | None:
    if not tensor_type.name.startswith(("IQ2", "IQ3")):
        return None
    reader = getattr(gguf.quants, tensor_type.name)
    reader.init_grid()
    grid: Bytes = reader.grid.reshape(-1, reader.grid.shape[-1]).astype(np.uint8)
    return grid


def blocks(tensor_type: T, random: np.random.Generator, n_rows: int, n_blocks: int) -> Bytes:
    """Any bytes, but finite scales: what a NaN's bits become depends on the processor."""
    size = GGML_QUANT_SIZES[tensor_type][1]
    raw = random.integers(0, 256, (n_rows * n_blocks, size), dtype=np.uint8)
    for place in SCALES[tensor_type]:
        exponents = random.integers(0, 31, len(raw), dtype=np.uint8) << 2
        raw[:, place + 1] = (raw[:, place + 1] & 0x83) | exponents
    return raw.reshape(n_rows, n_blocks * size)


def check(tensor_type: T, raw: Bytes) -> None:
    found = kernels().dequantize(raw, tensor_type, codebook(tensor_type))
    wanted = load_ggml().dequantize(raw, tensor_type)
    assert found.shape == wanted.shape
    assert (found.view(np.uint32) == wanted.view(np.uint32)).all()


@pytest.mark.parametrize("tensor_type", SCALES)
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), n_rows=st.integers(0, 20), n_blocks=st.integers(1, 4))
def test_any_bytes_are_read_as_libggml_reads_them(
    tensor_type: T, seed: int, n_rows: int, n_blocks: int
) -> None:
    check(tensor_type, blocks(tensor_type, np.random.default_rng(seed), n_rows, n_blocks))


@pytest.mark.slow
@pytest.mark.parametrize("tensor_type", SCALES)
def test_two_million_values(tensor_type: T) -> None:
    n_blocks = 8192 // GGML_QUANT_SIZES[tensor_type][0]
    check(tensor_type, blocks(tensor_type, np.random.default_rng(4), 256, n_blocks))


@pytest.mark.parametrize("tensor_type", SCALES)
def test_infinite_scales_stay_so(tensor_type: T) -> None:
    raw = blocks(tensor_type, np.random.default_rng(6), 4, 1)
    for place in SCALES[tensor_type]:
        raw[:2, place : place + 2] = [0x00, 0x7C]
        raw[2:, place : place + 2] = [0x01, 0xFE]
    found = kernels().dequantize(raw, tensor_type, codebook(tensor_type))
    assert np.array_equal(found, load_ggml().dequantize(raw, tensor_type), equal_nan=True)
    assert not np.isfinite(found).all()


def test_a_codebook_is_asked_for() -> None:
    raw = np.zeros((1, GGML_QUANT_SIZES[T.IQ3_S][1]), np.uint8)
    with pytest.raises(ValueError, match=r"needs a codebook of \(512, 4\), found none"):
        kernels().dequantize(raw, T.IQ3_S)
    with pytest.raises(ValueError, match=r"found \(256, 4\)"):
        kernels().dequantize(raw, T.IQ3_S, np.ones((256, 4), np.uint8))


def test_a_type_that_is_not_read() -> None:
    raw = np.zeros((1, GGML_QUANT_SIZES[T.IQ1_S][1]), np.uint8)
    with pytest.raises(ValueError, match="IQ1_S is not read"):
        kernels().dequantize(raw, T.IQ1_S)
