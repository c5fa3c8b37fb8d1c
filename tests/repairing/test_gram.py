"""The Gram matrix and the solution, in every way of holding it, against numpy in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from reap2gguf.errors import ObservationError
from reap2gguf.repairing import gram
from reap2gguf.repairing.gram import FormedGram, gram_of
from reap2gguf.repairing.gram_size import WAYS
from tests.repairing.layers import WIDTH, random_layer


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gram.TILE, "cpu", 2 * WIDTH)
    monkeypatch.setitem(gram.PIECE, "cpu", 7)


@pytest.mark.usefixtures("small_tiles")
def test_tiles_are_phi_transposed_times_phi() -> None:
    layer = random_layer(20, 9)
    found = gram_of(layer.features, "device")
    assert isinstance(found, FormedGram)
    expected = layer.phi().T @ layer.phi()
    tiles = found._tiles
    assert len(tiles.bounds) == 3
    for (i, j), tile in tiles.held.items():
        np.testing.assert_allclose(tile, expected[tiles.bounds[i], tiles.bounds[j]], atol=1e-12)
    np.testing.assert_allclose(found.right, layer.phi().T @ layer.errors(), atol=1e-12)
    assert found.diagonal_mean == pytest.approx(np.diag(expected).mean(), rel=1e-12)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("alpha", [1.0, 0.03])
def test_every_way_gives_numpys_ridge_towards_the_original_weights(way: str, alpha: float) -> None:
    layer = random_layer(40, 23, 1)
    equations = gram_of(layer.features, way)
    shift = alpha * equations.diagonal_mean
    change = equations.solve(shift, None)
    assert change is not None
    phi, original = layer.phi(), layer.original.numpy()
    targets = layer.errors() + phi @ original
    # minimise |T - Phi D|^2 + lambda |D - D0|^2: rows of sqrt(lambda) below Phi
    stacked = np.vstack([phi, np.sqrt(shift) * np.eye(phi.shape[1])])
    wanted = np.vstack([targets, np.sqrt(shift) * original])
    expected = np.linalg.lstsq(stacked, wanted, rcond=None)[0]
    np.testing.assert_allclose(original + change.numpy(), expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("way", WAYS)
def test_an_expert_that_no_row_reaches_keeps_its_weights(way: str) -> None:
    layer = random_layer(30, unseen=2)
    equations = gram_of(layer.features, way)
    change = equations.solve(0.1 * equations.diagonal_mean, None)
    assert change is not None
    assert not change[layer.features.columns(2)].any()
    assert change[layer.features.columns(1)].any()


@pytest.mark.parametrize("way", ["device", "never"])
def test_float32_rows_give_the_same_bits_twice(way: str) -> None:
    layer = random_layer(50, dtype=torch.float32)
    first, second = (gram_of(layer.features, way).solve(0.1, None) for _ in range(2))
    assert first is not None
    assert second is not None
    assert torch.equal(first, second)


def test_a_layer_without_rows_is_refused() -> None:
    with pytest.raises(ObservationError, match="no token is left"):
        gram_of(random_layer().features, "device")
