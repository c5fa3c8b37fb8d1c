"""Figures against their definitions, and errors against repeated samples."""

from __future__ import annotations

import math

import numpy as np
import pytest

from reap2gguf.evaluating.figures import TokenPair, divergence, perplexity


def pair_of(draw: np.random.Generator, n: int = 2000) -> TokenPair:
    """Two variants of which the other is a little worse."""
    reference = draw.gamma(2.0, 1.0, n)
    change = draw.normal(0.05, 0.2, n)
    kl = draw.gamma(0.5, 0.1, n)
    return TokenPair(kl, draw.random(n) < 0.9, reference, reference + change)


def test_perplexity_is_that_of_llama_perplexity() -> None:
    nll = np.array([1.0, 2.0, 4.0])
    mean, mean_square = 7 / 3, 21 / 3
    error = math.sqrt((mean_square - mean**2) / (len(nll) - 1))
    found = perplexity(nll)
    assert found.value == pytest.approx(math.exp(mean))
    assert found.error == pytest.approx(error * math.exp(mean))


def test_a_perplexity_that_no_record_may_hold_is_an_error() -> None:
    for nll in ([800.0, 800.0], [692.0, 692.0], [0.0, 1380.0]):
        with pytest.raises(OverflowError):
            perplexity(np.array(nll))


def test_figures_of_a_comparison_by_hand() -> None:
    reference = np.log([2.0, 4.0, 8.0, 2.0])
    other = np.log([4.0, 4.0, 4.0, 4.0])
    kl = np.array([0.0, 0.4, 0.1, 0.3])
    found = divergence(TokenPair(kl, np.array([True, False, True, True]), reference, other))
    assert found.mean.value == pytest.approx(0.2)
    assert found.median.value == pytest.approx(0.2)
    assert found.maximum == 0.4
    assert found.same_top.value == 0.75
    change = np.array([-0.25, 0.0, 0.125, -0.25])
    assert found.rms_probability.value == pytest.approx(math.sqrt((change**2).mean()))
    assert found.perplexity_ratio.value == pytest.approx(math.exp((other - reference).mean()))


def test_a_variant_beside_itself_has_no_divergence() -> None:
    nll = np.array([1.0, 2.0, 3.0])
    found = divergence(TokenPair(np.zeros(3), np.ones(3, dtype=bool), nll, nll))
    assert (found.mean.value, found.maximum, found.same_top.value) == (0.0, 0.0, 1.0)
    assert (found.rms_probability.value, found.rms_probability.error) == (0.0, 0.0)
    assert (found.perplexity_ratio.value, found.perplexity_ratio.error) == (1.0, 0.0)


def test_errors_are_the_spread_of_repeated_samples() -> None:
    draw = np.random.default_rng(0)
    found = [divergence(pair_of(draw)) for _ in range(300)]
    for name in ("mean", "median", "p90", "p99", "same_top", "rms_probability", "perplexity_ratio"):
        values = [getattr(one, name).value for one in found]
        claimed = float(np.mean([getattr(one, name).error for one in found]))
        assert np.std(values) == pytest.approx(claimed, rel=0.25), name
