"""Types with blocks of 32, and the non-linear ones: the kernels make libggml's bytes."""

from __future__ import annotations

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as T
from hypothesis import given, settings
from hypothesis import strategies as st

from reap2gguf.ggml import load_ggml
from reap2gguf.quantizing.kernels.codebooks import codebook
from reap2gguf.quantizing.stored_rows import StoredRows
from tests.quantizing.kernels.cases import Floats, kernels, needs_kernels, odd_rows

TYPES = (T.Q8_0, T.Q4_0, T.Q4_1, T.Q5_0, T.Q5_1, T.IQ4_NL, T.IQ4_XS)
HALVES = (T.F16, T.BF16)
KINDS = (
    "normal", "student", "bf16", "few levels", "sparse", "zeros", "minus zero", "constant",
    "positive", "negative", "narrow", "row scales", "block scales", "value scales",
)  # fmt: skip
WEIGHTS = ("none", "ones", "gamma", "12 decades", "half zero", "zero", "one", "tiny", "huge")

pytestmark = needs_kernels


def values(kind: str, random: np.random.Generator, shape: tuple[int, int]) -> Floats:
    """Rows of one of KINDS."""
    n, c = shape
    normal = random.standard_normal(shape)
    if kind == "bf16":
        words = (random.standard_t(3, shape) * 0.02).astype(np.float32).view(np.uint32)
        return (words & np.uint32(0xFFFF0000)).view(np.float32)
    made = {
        "normal": lambda: normal * 0.02,
        "student": lambda: random.standard_t(2, shape),
        "few levels": lambda: random.choice([0, 0.5, -0.25, 1], shape),
        "sparse": lambda: np.where(random.random(shape) < 0.95, 0, normal),
        "zeros": lambda: np.zeros(shape),
        "minus zero": lambda: np.full(shape, -0.0),
        "constant": lambda: np.full(shape, random.choice([0.7, -0.7])),
        "positive": lambda: np.abs(normal),
        "negative": lambda: -np.abs(normal),
        "narrow": lambda: -1 - np.abs(normal) * 1e-4,
        "row scales": lambda: normal * 10.0 ** random.uniform(-40, 18, (n, 1)),
        "block scales": lambda: (
            normal * (10.0 ** random.uniform(-9, 4, (n, c // 32))).repeat(32, 1)
        ),
        "value scales": lambda: normal * 10.0 ** random.uniform(-12, 4, shape),
    }[kind]()
    return made.astype(np.float32)


def importance(kind: str, random: np.random.Generator, c: int) -> Floats | None:
    """What weighs the columns, one of WEIGHTS."""
    if kind == "none":
        return None
    gamma = random.gamma(1, 1, c)
    made = {
        "ones": lambda: np.ones(c),
        "gamma": lambda: gamma,
        "12 decades": lambda: 10.0 ** random.uniform(-6, 6, c),
        "half zero": lambda: np.where(random.random(c) < 0.5, 0, gamma),
        "zero": lambda: np.zeros(c),
        "one": lambda: np.arange(c) % 32 == 5,
        "tiny": lambda: gamma * 1e-38,
        "huge": lambda: gamma * 1e30,
    }[kind]()
    return made.astype(np.float32)


def odd_share(rows: Floats, tensor_type: T, weights: Floats | None) -> float:
    """The share of odd rows; all others are compared with libggml."""
    return float(odd_rows(rows, tensor_type, weights).mean())


@pytest.mark.parametrize("tensor_type", TYPES)
@settings(max_examples=25, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    weights=st.sampled_from(WEIGHTS),
    seed=st.integers(0, 2**32 - 1),
    n_rows=st.integers(1, 40),
    n_blocks=st.integers(1, 3),
)
def test_the_bytes_are_those_of_libggml(
    tensor_type: T, kind: str, weights: str, seed: int, n_rows: int, n_blocks: int
) -> None:
    random = np.random.default_rng(seed)
    n_columns = n_blocks * GGML_QUANT_SIZES[tensor_type][0]
    rows = values(kind, random, (n_rows, n_columns))
    odd_share(rows, tensor_type, importance(weights, random, n_columns))


@pytest.mark.slow
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("tensor_type", TYPES)
def test_many_rows_of_every_kind(tensor_type: T, weights: str) -> None:
    random = np.random.default_rng(7)
    for kind in KINDS:
        rows = values(kind, random, (96, 1024))
        odd_share(rows, tensor_type, importance(weights, random, 1024))


@pytest.mark.parametrize("weights", ["none", "gamma"])
@pytest.mark.parametrize(
    "tensor_type", [*TYPES, *HALVES, T.Q2_K, T.Q3_K, T.Q4_K, T.Q5_K, T.Q6_K, T.IQ3_S]
)
@pytest.mark.parametrize("n_rows", [1, 37])
def test_bfloat16_as_it_is_stored_makes_the_same_blocks(
    tensor_type: T, weights: str, n_rows: int
) -> None:
    random = np.random.default_rng(4)
    rows = values("bf16", random, (n_rows, 768))
    stored = StoredRows((rows.view(np.uint32) >> 16).astype(np.uint16), "BF16")
    book = codebook(load_ggml(), tensor_type)
    others = (importance(weights, random, 768), None if book is None else book.pointers())
    wanted, is_odd = kernels().quantize(rows, tensor_type, *others)
    found, found_odd = kernels().quantize(stored, tensor_type, *others)
    assert not is_odd.any()
    assert not found_odd.any()
    assert np.array_equal(found, wanted)


@pytest.mark.parametrize("weights", ["none", "gamma", "one"])
@pytest.mark.parametrize("tensor_type", [T.Q3_K, T.Q6_K, T.Q4_0, T.Q5_0])
def test_the_first_of_a_value_and_its_opposite_gives_the_step(tensor_type: T, weights: str) -> None:
    random = np.random.default_rng(5)
    rows = random.standard_normal((64, 1024)).astype(np.float32)
    groups = rows.reshape(-1, 16)
    largest = np.abs(groups).max(axis=1) * np.float32(1.01)
    places = np.argsort(random.random(groups.shape), axis=1)
    np.put_along_axis(groups, places[:, :1], largest[:, None], axis=1)
    np.put_along_axis(groups, places[:, 1:2], -largest[:, None], axis=1)
    assert not odd_share(rows, tensor_type, importance(weights, random, 1024))


@pytest.mark.parametrize("weights", ["none", "gamma", "12 decades"])
@pytest.mark.parametrize("tensor_type", TYPES)
def test_no_row_of_trained_weights_is_odd(tensor_type: T, weights: str) -> None:
    random = np.random.default_rng(3)
    for kind in ("normal", "student", "bf16", "few levels", "zeros", "minus zero"):
        rows = values(kind, random, (33, 256))
        assert not odd_share(rows, tensor_type, importance(weights, random, 256)), kind


@pytest.mark.parametrize("tensor_type", TYPES)
@pytest.mark.parametrize("wrong", [np.inf, -np.inf, np.nan])
def test_rows_that_are_not_finite_are_odd(tensor_type: T, wrong: float) -> None:
    rows = values("normal", np.random.default_rng(5), (8, 256))
    rows[3, 40] = wrong
    for weights in (None, np.ones(256, np.float32)):
        assert kernels().quantize(rows, tensor_type, weights)[1].tolist() == [
            row == 3 for row in range(8)
        ]


@pytest.mark.parametrize("tensor_type", HALVES)
@pytest.mark.parametrize("n_columns", [1, 31, 256])
def test_halves_of_any_bits_are_those_of_libggml(tensor_type: T, n_columns: int) -> None:
    bits = np.random.default_rng(9).integers(0, 2**32, (500, n_columns), dtype=np.uint32)
    edges = np.array([0x7F800000, 0xFF800000, 0x7FC00001, 0xFF800001, 0x38800000, 0x80000001])
    bits[: len(edges), 0] = edges
    rows = bits.view(np.float32)
    found, is_odd = kernels().quantize(rows, tensor_type, None)
    assert (found == load_ggml()._quantize(rows, tensor_type, None)).all()
    is_finite = np.isfinite(load_ggml().dequantize(found, tensor_type)).all(axis=1)
    assert (is_odd == ~is_finite).all()  # libggml refuses them
