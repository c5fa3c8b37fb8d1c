"""One layer's repair: which alpha it takes, what it keeps, and its one number per expert."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from reap2gguf.repairing.capture import split_rows
from reap2gguf.repairing.layer import ALPHAS, NEARLY, fit_layer, scales
from tests.repairing.layers import N_EXPERTS, TOP_K, WIDTH, HeldRows, Layer, random_layer


def same(weights: torch.Tensor) -> torch.Tensor:
    return weights


def halves(layer: Layer) -> tuple[Layer, Layer]:
    """The first batch, and the others."""
    rows, index = list(layer.features.rows), layer.index
    return tuple(
        replace(
            layer, features=replace(layer.features, rows=HeldRows(rows[part])), index=index[part]
        )
        for part in (slice(1), slice(1, None))
    )  # type: ignore[return-value]


def with_truth(layer: Layer, noise: float, seed: int = 7) -> Layer:
    """Errors that a change of the weights explains, but for some noise."""
    generator = np.random.default_rng(seed)
    change = generator.normal(size=tuple(layer.original.shape))
    explained, rows, first = layer.phi() @ change, [], 0
    for one in layer.features.rows:
        own = explained[first : first + len(one)]
        errors = torch.from_numpy(own + noise * generator.normal(size=own.shape))
        rows.append(replace(one, errors=errors, target_square=float(errors.square().sum())))
        first += len(one)
    return replace(layer, features=replace(layer.features, rows=HeldRows(rows)))


def nearly_the_best(errors: dict[float, float], before: float) -> float:
    """The strongest alpha of nearly the least error."""
    gains = {alpha: before - error for alpha, error in errors.items()}
    best = max(gains.values())
    return next(alpha for alpha in ALPHAS if gains[alpha] >= NEARLY * best)


@pytest.mark.parametrize("noise", [0.5, 3.0, 6.0])
def test_alpha_is_the_strongest_of_nearly_the_least_error_on_held_out_rows(noise: float) -> None:
    fitted, held = halves(with_truth(random_layer(400, 60), noise=noise))
    fit, weights = fit_layer(
        fitted.features, held.features, fitted.original, same, "ridge", "device"
    )
    phi, gram = held.phi(), fitted.phi().T @ fitted.phi()
    right = fitted.phi().T @ fitted.errors()
    errors = {}
    for alpha in ALPHAS:
        shift = alpha * np.diag(gram).mean()
        change = np.linalg.solve(gram + shift * np.eye(len(gram)), right)
        errors[alpha] = np.square(held.errors() - phi @ change).sum()
    total = np.square(held.errors()).sum()
    assert fit.alpha == nearly_the_best(errors, total)
    assert fit.error_before == pytest.approx(1.0)
    assert fit.error_after == pytest.approx(np.sqrt(errors[fit.alpha] / total), rel=1e-9)
    assert (fit.n_fitted, fit.n_held_out) == (400, 60)
    assert weights is not None
    assert not torch.equal(weights, fitted.original)


def test_a_layer_whose_error_does_not_fall_keeps_its_weights() -> None:
    # errors that have nothing to do with the inputs: a fit to twelve rows only adds to them
    fitted, held = halves(random_layer(12, 300, seed=2))
    fit, weights = fit_layer(
        fitted.features, held.features, fitted.original, same, "ridge", "never"
    )
    assert (fit.alpha, weights) == (None, None)
    assert fit.error_after == fit.error_before


def test_errors_are_of_weights_as_they_are_stored() -> None:
    fitted, held = halves(with_truth(random_layer(200, 60), noise=0.1))

    def coarse(weights: torch.Tensor) -> torch.Tensor:
        return (weights * 2).round() / 2

    fit, weights = fit_layer(
        fitted.features, held.features, coarse(fitted.original), coarse, "ridge", "device"
    )
    assert weights is not None
    assert torch.equal(weights, coarse(weights))
    change = (weights - coarse(fitted.original)).numpy()
    left = np.square(held.errors() - held.phi() @ change).sum()
    expected = np.sqrt(left / np.square(held.errors()).sum())
    assert fit.error_after == pytest.approx(expected, rel=1e-9)


def test_scales_are_the_least_squares_of_one_number_per_expert() -> None:
    layer = random_layer(50, 31)
    outputs = np.stack(
        [
            layer.phi()[:, e * WIDTH : (e + 1) * WIDTH]
            @ layer.original.numpy()[e * WIDTH : (e + 1) * WIDTH]
            for e in range(N_EXPERTS)
        ]
    )  # (E, N, H)
    flat = outputs.reshape(N_EXPERTS, -1)
    gram = flat @ flat.T
    shift = 1e-3 * np.trace(gram) / N_EXPERTS
    right = flat @ layer.errors().ravel()
    expected = 1 + np.linalg.solve(gram + shift * np.eye(N_EXPERTS), right)
    found = scales(layer.features, layer.original)
    np.testing.assert_allclose(found.numpy(), expected, rtol=2e-6)  # outputs are float32


def test_a_scale_repair_multiplies_whole_experts() -> None:
    layer = random_layer(300, 50)
    rows = []
    for one, phi in zip(layer.features.rows, np.split(layer.phi(), [300]), strict=True):
        # the target is less than the sum by a fifth
        sums = torch.from_numpy(phi @ layer.original.numpy())
        rows.append(
            replace(one, errors=-0.2 * sums, target_square=float((0.8 * sums).square().sum()))
        )
    fitted, held = halves(replace(layer, features=replace(layer.features, rows=HeldRows(rows))))
    fit, weights = fit_layer(fitted.features, held.features, layer.original, same, "scale", "")
    assert weights is not None
    ratio = (weights / layer.original).view(N_EXPERTS, -1)
    assert torch.allclose(ratio, torch.full_like(ratio, 0.8), rtol=2e-3)
    assert fit.error_after < 0.01 < fit.error_before == pytest.approx(0.25)


def test_every_eighth_row_is_held_out_across_batches() -> None:
    flags = split_rows([1] * 5, 0) + split_rows([1] * 20, 5)
    assert [number for number, flag in enumerate(flags) if flag] == [7, 15, 23]
    assert TOP_K < N_EXPERTS
