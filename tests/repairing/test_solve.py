"""Solvers against numpy's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from reap2gguf.repairing.solve import Tiles, back_substituted, conjugate_gradients, factored, solved

SIZES = (3, 4, 4)


def spd(seed: int = 0, n: int = sum(SIZES)) -> np.ndarray:
    values = np.random.default_rng(seed).normal(size=(n, 2 * n))
    return values @ values.T


def tiles_of(matrix: np.ndarray, dtype: torch.dtype) -> Tiles:
    ends = np.cumsum(SIZES)
    bounds = [slice(int(end) - size, int(end)) for end, size in zip(ends, SIZES, strict=True)]
    cpu = torch.device("cpu")
    tiles = Tiles(bounds, cpu, cpu)
    whole = torch.from_numpy(matrix).to(dtype)
    for i, rows in enumerate(bounds):
        for j, columns in enumerate(bounds[: i + 1]):
            tiles[i, j] = whole[rows, columns].clone()
    return tiles


def test_the_factor_is_numpys_cholesky() -> None:
    matrix = spd()
    factor = factored(tiles_of(matrix, torch.float64), 0.5, map)
    expected = np.linalg.cholesky(matrix + 0.5 * np.eye(len(matrix)))
    for (i, j), tile in factor.held.items():
        found = tile.numpy()
        np.testing.assert_allclose(
            found, expected[factor.bounds[i], factor.bounds[j]], rtol=1e-12, atol=1e-12
        )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 3e-7)])
def test_a_solution_is_numpys(dtype: torch.dtype, tolerance: float) -> None:
    # the tiles are float32 values in both, so that rounding them is not part of the difference
    matrix = spd().astype(np.float32).astype(np.float64)
    right = np.random.default_rng(1).normal(size=(len(matrix), 3)).astype(np.float32)
    found = solved(tiles_of(matrix, dtype), 0.25, torch.from_numpy(right).to(dtype), map)
    expected = np.linalg.solve(matrix + 0.25 * np.eye(len(matrix)), right.astype(np.float64))
    assert found.dtype == dtype
    error = np.linalg.norm(found.numpy() - expected) / np.linalg.norm(expected)
    assert error < tolerance


def test_refinement_reaches_what_float32_alone_does_not() -> None:
    generator = np.random.default_rng(3)
    turn = np.linalg.qr(generator.normal(size=(sum(SIZES), sum(SIZES))))[0]
    matrix = ((turn * np.geomspace(1, 1e-5, sum(SIZES))) @ turn.T).astype(np.float32)
    matrix = np.tril(matrix) + np.tril(matrix, -1).T
    right = torch.from_numpy(generator.normal(size=(sum(SIZES), 2)).astype(np.float32))
    tiles = tiles_of(matrix, torch.float32)
    expected = np.linalg.solve(matrix.astype(np.float64), right.double().numpy())
    plain = back_substituted(factored(tiles, 0.0, map), right).double().numpy()
    refined = solved(tiles, 0.0, right, map).double().numpy()
    size = np.linalg.norm(expected)
    assert np.linalg.norm(plain - expected) / size > 1e-5
    assert np.linalg.norm(refined - expected) / size < 1e-6


def test_a_matrix_that_is_not_positive_definite_is_refused() -> None:
    with pytest.raises(torch.linalg.LinAlgError):
        factored(tiles_of(-spd(), torch.float64), 0.0, map)


def test_conjugate_gradients_find_numpys_solution_from_any_start() -> None:
    n = 12
    matrix = torch.from_numpy(spd(4, n))
    blocks = torch.stack([matrix[i : i + 4, i : i + 4] for i in range(0, n, 4)])
    right = torch.from_numpy(np.random.default_rng(5).normal(size=(n, 3)))
    right[:, 1] = 0  # a column that is solved from the beginning
    expected = np.linalg.solve(matrix.numpy(), right.numpy())
    for start in (None, torch.ones_like(right)):
        found = conjugate_gradients(lambda values: matrix @ values, blocks, right, start)
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-8, atol=1e-9)
