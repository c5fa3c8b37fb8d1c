"""Q2_K to Q6_K, with importance and without: the kernels make libggml's bytes."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from gguf import GGMLQuantizationType as T
from hypothesis import given, settings
from hypothesis import strategies as st

from reap2gguf.quantizing.kernels.compiled import load_kernels
from tests.quantizing.kernels.cases import Floats, needs_kernels, odd_rows

TYPES = (T.Q2_K, T.Q3_K, T.Q4_K, T.Q5_K, T.Q6_K)
SUPER_BLOCK, GROUP = 256, 16
TRAINED = ("normal", "student", "bf16", "few levels")
KINDS = (
    *TRAINED,
    "two levels", "grid", "sparse", "zeros", "minus zero", "constant", "constant groups",
    "positive", "negative", "narrow", "one side a group", "outlier", "row scales", "group scales",
    "value scales", "near the least scale", "large",
)  # fmt: skip
PLAIN_WEIGHTS = ("none", "ones", "gamma", "12 decades")
WEIGHTS = (*PLAIN_WEIGHTS, "half zero", "zero groups", "zero", "one", "tiny", "huge")

pytestmark = needs_kernels


def values(kind: str, random: np.random.Generator, shape: tuple[int, int]) -> Floats:
    """Rows of one of KINDS."""
    n, c = shape
    normal = random.standard_normal(shape)
    if kind == "bf16":
        words = (random.standard_t(3, shape) * 0.02).astype(np.float32).view(np.uint32)
        return (words & np.uint32(0xFFFF0000)).view(np.float32)

    def by_group(of_groups: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        return of_groups.repeat(GROUP, 1)

    groups = (n, c // GROUP)
    made = {
        "normal": lambda: normal * 0.02,
        "student": lambda: random.standard_t(2, shape),
        "few levels": lambda: random.choice([0, 0.5, -0.25, 1], shape),
        "two levels": lambda: random.choice([-1.0, 1.0], shape),
        "grid": lambda: random.integers(-32, 32, shape) * random.choice([0.125, 1, 0.3], (n, 1)),
        "sparse": lambda: np.where(random.random(shape) < 0.95, 0, normal),
        "zeros": lambda: np.zeros(shape),
        "minus zero": lambda: np.where(random.random(shape) < 0.5, -0.0, normal),
        "constant": lambda: np.full(shape, random.choice([0.7, -0.7])),
        "constant groups": lambda: by_group(random.standard_normal(groups)),
        "positive": lambda: np.abs(normal) + 0.1,
        "negative": lambda: -np.abs(normal) - 3,
        "narrow": lambda: -100 - np.abs(normal) * 1e-3,
        "one side a group": lambda: np.abs(normal) * by_group(random.choice([-1.0, 1.0], groups)),
        "outlier": lambda: np.where(np.arange(c) == random.integers(0, c, (n, 1)), 100, normal),
        "row scales": lambda: normal * 10.0 ** random.uniform(-40, 18, (n, 1)),
        "group scales": lambda: normal * by_group(10.0 ** random.uniform(-6, 4, groups)),
        "value scales": lambda: normal * 10.0 ** random.uniform(-6, 6, shape),
        "near the least scale": lambda: normal * 10.0 ** random.uniform(-16, -6, (n, 1)),
        "large": lambda: normal * 10.0 ** random.uniform(4, 12, (n, 1)),
    }[kind]()
    return made.astype(np.float32)


def importance(kind: str, random: np.random.Generator, c: int) -> Floats | None:
    """What weighs the columns, one of WEIGHTS."""
    if kind == "none":
        return None
    gamma, columns = random.gamma(1, 1, c), np.arange(c)
    made = {
        "ones": lambda: np.ones(c),
        "gamma": lambda: gamma,
        "12 decades": lambda: 10.0 ** random.uniform(-6, 6, c),
        "half zero": lambda: np.where(random.random(c) < 0.5, 0, gamma),
        "zero groups": lambda: gamma * (columns // GROUP % 3 > 0),
        "zero": lambda: np.zeros(c),
        "one": lambda: columns % SUPER_BLOCK == 77,
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
    rows = values(kind, random, (n_rows, n_blocks * SUPER_BLOCK))
    odd_share(rows, tensor_type, importance(weights, random, rows.shape[1]))


@pytest.mark.parametrize("tensor_type", TYPES)
@settings(max_examples=25, deadline=None)
@given(
    kinds=st.lists(st.sampled_from(KINDS), min_size=2, max_size=6),
    weights=st.sampled_from(WEIGHTS),
    seed=st.integers(0, 2**32 - 1),
)
def test_groups_of_many_kinds_in_one_row(
    tensor_type: T, kinds: list[str], weights: str, seed: int
) -> None:
    random = np.random.default_rng(seed)
    shape = (17, SUPER_BLOCK)
    rows, groups = values(kinds[0], random, shape), np.arange(SUPER_BLOCK) // GROUP
    for kind in kinds[1:]:
        is_other = random.integers(0, 2, (17, 16))[:, groups] == 1
        rows = np.where(is_other, values(kind, random, shape), rows)
    odd_share(rows, tensor_type, importance(weights, random, SUPER_BLOCK))


@pytest.mark.parametrize("tensor_type", TYPES)
@settings(max_examples=25, deadline=None)
@given(
    row=st.lists(
        st.one_of(st.floats(width=32, allow_nan=False, allow_infinity=False), st.integers(-40, 40)),
        min_size=1,
        max_size=40,
    ),
    weights=st.lists(st.floats(0, 2.0**20, width=32), max_size=20),
)
def test_values_that_nobody_chose(
    tensor_type: T, row: list[float | int], weights: list[float]
) -> None:
    rows = np.resize(np.array(row, dtype=np.float32), (1, SUPER_BLOCK))
    weight = np.resize(np.array(weights, dtype=np.float32), SUPER_BLOCK) if weights else None
    odd_share(rows, tensor_type, weight)


@pytest.mark.parametrize("weights", PLAIN_WEIGHTS)
@pytest.mark.parametrize("tensor_type", TYPES)
def test_no_row_like_trained_weights_is_odd(tensor_type: T, weights: str) -> None:
    random = np.random.default_rng(3)
    for kind in (*TRAINED, "two levels", "zeros", "minus zero", "constant", "outlier"):
        rows = values(kind, random, (33, SUPER_BLOCK))
        assert odd_share(rows, tensor_type, importance(weights, random, SUPER_BLOCK)) == 0, kind


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("tensor_type", TYPES)
def test_a_row_that_is_not_finite_spoils_no_other(tensor_type: T, value: float) -> None:
    kernels = load_kernels()
    assert kernels is not None
    random = np.random.default_rng(5)
    rows = values("normal", random, (9, SUPER_BLOCK))
    spoilt = rows.copy()
    spoilt[4, 100] = value
    for weights in (None, importance("gamma", random, SUPER_BLOCK)):
        wanted, _ = kernels.quantize(rows, tensor_type, weights)
        found, is_odd = kernels.quantize(spoilt, tensor_type, weights)
        others = np.arange(9) != 4
        assert not is_odd[others].any()
        assert (found == wanted)[others].all()


@pytest.mark.slow
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("tensor_type", TYPES)
def test_many_rows_of_every_kind(tensor_type: T, weights: str) -> None:
    random = np.random.default_rng(7)
    for kind in KINDS:
        rows = values(kind, random, (96, 4 * SUPER_BLOCK))
        odd_share(rows, tensor_type, importance(weights, random, rows.shape[1]))


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["none", "12 decades"])
@pytest.mark.parametrize("tensor_type", TYPES)
def test_a_million_weights_of_every_trained_kind(tensor_type: T, weights: str) -> None:
    random = np.random.default_rng(8)
    for kind in (*TRAINED, "sparse"):
        rows = values(kind, random, (512, 8 * SUPER_BLOCK))
        assert odd_share(rows, tensor_type, importance(weights, random, rows.shape[1])) == 0, kind
