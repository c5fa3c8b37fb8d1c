"""Codebooks are learned from libggml, and blocks made with them are libggml's."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from gguf import GGML_QUANT_SIZES, quants
from gguf import GGMLQuantizationType as T
from hypothesis import given, settings
from hypothesis import strategies as st

from reap2gguf.errors import DependencyError
from reap2gguf.ggml import Ggml, load_ggml
from reap2gguf.quantizing.kernels.codebooks import CHUNK, codebook
from tests.quantizing.kernels.cases import Floats, kernels, needs_kernels, odd_rows

TYPES = (T.IQ3_S, T.IQ3_XXS, T.IQ2_S, T.IQ2_XS, T.IQ2_XXS)
# libggml makes them without importance too, IQ3_XXS only if it is asked directly
WITHOUT = (T.IQ3_S, T.IQ3_XXS, T.IQ2_S)
COLUMNS = 512
rows_of = {
    "normal": lambda r, s: r.standard_normal(s) * 0.02,
    "far out": lambda r, s: r.standard_t(2, s),
    "few levels": lambda r, s: r.choice([0, 0.5, -0.25, 1], s),
    "sparse": lambda r, s: np.where(r.random(s) < 0.97, 0, r.standard_normal(s)),
    "a scale for each row": lambda r, s: (
        r.standard_normal(s) * 10.0 ** r.uniform(-12, 3, (s[0], 1))
    ),
    "a scale for each value": lambda r, s: r.standard_normal(s) * 10.0 ** r.uniform(-6, 3, s),
    "all negative": lambda r, s: -3 - r.random(s),
    "constant": lambda r, s: np.full(s, 0.7),
    "negative zeros": lambda r, s: np.where(r.random(s) < 0.5, -0.0, r.standard_normal(s)),
    "zeros": lambda r, s: np.zeros(s),
    "tiny": lambda r, s: r.standard_normal(s) * 1e-40,
}
importance_of = {
    "uniform": lambda r: r.random(COLUMNS),
    "ones": lambda r: np.ones(COLUMNS),
    "12 decades": lambda r: 10.0 ** r.uniform(-6, 6, COLUMNS),
    "half zeros": lambda r: np.where(r.random(COLUMNS) < 0.5, 0, r.random(COLUMNS)),
    "zeros": lambda r: np.zeros(COLUMNS),
    "few": lambda r: np.where(np.arange(COLUMNS) % 37, 0, 1),
    "tiny": lambda r: r.random(COLUMNS) * 1e-38,
    "huge": lambda r: r.random(COLUMNS) * 1e30,
}


def _compare(rows: Floats, tensor_type: T, importance: Floats | None) -> int:
    """Assert that rows that are not odd are libggml's; how many are odd."""
    return int(odd_rows(rows, tensor_type, importance).sum())


@needs_kernels
@pytest.mark.parametrize("tensor_type", TYPES)
@settings(max_examples=25, deadline=None)
@given(
    kind=st.sampled_from(sorted(rows_of)),
    weights=st.sampled_from(["none", *sorted(importance_of)]),
    n_rows=st.integers(1, 40),
    seed=st.integers(0, 2**32 - 1),
)
def test_blocks_are_those_of_libggml(
    tensor_type: T, kind: str, weights: str, n_rows: int, seed: int
) -> None:
    random = np.random.default_rng(seed)
    if weights == "none" and tensor_type not in WITHOUT:
        weights = "ones"
    importance = None if weights == "none" else importance_of[weights](random).astype(np.float32)
    rows = rows_of[kind](random, (n_rows, COLUMNS)).astype(np.float32)
    n_odd = _compare(rows, tensor_type, importance)
    if kind != "tiny" and weights != "huge":
        assert n_odd == 0


@needs_kernels
@pytest.mark.slow
@pytest.mark.parametrize("tensor_type", TYPES)
def test_a_million_weights_of_each_kind_are_those_of_libggml(tensor_type: T) -> None:
    random = np.random.default_rng(0)
    for kind in ("normal", "far out", "few levels", "sparse", "a scale for each row"):
        for weights in ("12 decades", "uniform", "half zeros", "none"):
            if weights == "none" and tensor_type not in WITHOUT:
                continue
            importance = (
                None if weights == "none" else importance_of[weights](random).astype(np.float32)
            )
            rows = rows_of[kind](random, (500, COLUMNS)).astype(np.float32)
            assert _compare(rows, tensor_type, importance) == 0


@needs_kernels
def test_no_block_is_made_without_the_importance_that_libggml_needs() -> None:
    rows = np.ones((1, 256), dtype=np.float32)
    book = codebook(load_ggml(), T.IQ2_XS)
    assert book is not None
    with pytest.raises(AssertionError, match="IQ2_XS"):
        kernels().quantize(rows, T.IQ2_XS, None, book.pointers())


@pytest.mark.parametrize("tensor_type", TYPES)
def test_every_group_of_levels_has_a_place(tensor_type: T) -> None:
    book = codebook(load_ggml(), tensor_type)
    assert book is not None
    group, bits, n_levels = (4, 3, 8) if tensor_type in (T.IQ3_S, T.IQ3_XXS) else (8, 2, 3)
    levels = np.indices((n_levels,) * group).reshape(group, -1).T
    places = book.places[(levels << bits * np.arange(group)).sum(axis=1)]
    points = np.sort(places[places < 0] & 0xFFFF)
    assert (points == np.arange(len(points))).all()
    lists = places[places >= 0]
    firsts, counts = lists >> 10, lists & 1023
    assert counts.min() >= 1
    assert (firsts * CHUNK + counts).max() <= len(book.codes)
    assert (book.places[book.codes] < 0).all()  # neighbours are points


@pytest.mark.parametrize("tensor_type", TYPES)
def test_the_first_neighbour_is_a_nearest_point(tensor_type: T) -> None:
    book = codebook(load_ggml(), tensor_type)
    assert book is not None
    group, bits = (4, 3) if tensor_type in (T.IQ3_S, T.IQ3_XXS) else (8, 2)
    shifts = bits * np.arange(group)
    off_grid = np.flatnonzero((book.places >= 0) & (book.places < 2**31 - 1))[::7]
    points = np.flatnonzero(book.places < 0)[:, None] >> shifts & (1 << bits) - 1
    levels = off_grid[:, None] >> shifts & (1 << bits) - 1
    nearest = np.square(levels[:, None] - points).sum(axis=2).min(axis=1)
    first = book.codes[(book.places[off_grid] >> 10) * CHUNK].astype(np.int64)
    first_levels = first[:, None] >> shifts & (1 << bits) - 1
    assert (np.square(levels - first_levels).sum(axis=1) == nearest).all()


def test_other_types_have_none() -> None:
    assert codebook(load_ggml(), T.Q4_K) is None


def test_a_library_with_another_grid_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def ones(_: Ggml, raw: npt.NDArray[np.uint8], tensor_type: T) -> Floats:
        assert raw.shape[1] == GGML_QUANT_SIZES[tensor_type][1]
        return np.ones((len(raw), 256), dtype=np.float32)

    monkeypatch.setattr(Ggml, "dequantize", ones)
    with pytest.raises(DependencyError, match="1 different magnitudes"):
        codebook.__wrapped__(load_ggml(), T.IQ3_S)


@pytest.mark.parametrize("tensor_type", TYPES)
def test_entries_are_the_sizes_that_the_gguf_package_has(tensor_type: T) -> None:
    reader = getattr(quants, tensor_type.name)
    reader.init_grid()
    book = codebook(load_ggml(), tensor_type)
    assert book is not None
    assert (book.entries == reader.grid.reshape(book.entries.shape)).all()
