"""The choice of forms, compared with all choices that there are."""

from __future__ import annotations

import itertools
import time

import numpy as np
import numpy.typing as npt
import pytest

from reap2gguf.errors import UsageError
from reap2gguf.fitting.knapsack import choose


def problem(
    seed: int, n_items: int, n_forms: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Items of very different size, whose damage falls with their bytes but for some noise."""
    random = np.random.default_rng(seed)
    bits = np.sort(random.uniform(1.5, 16, n_forms))
    weights = random.choice([1e4, 4e4, 2e6], n_items)
    noise = random.lognormal(0, 0.4, (n_items, n_forms)) * random.lognormal(0, 1.5, (n_items, 1))
    return (weights[:, None] * bits / 8).astype(np.int64), 4.0**-bits * noise


@pytest.mark.parametrize("seed", range(40))
def test_nearly_the_best_of_all_choices(seed: int) -> None:
    sizes, damages = problem(seed, 6, 4)
    damages[seed % 6, 3] = np.inf
    low, high = sizes.min(axis=1).sum(), sizes.max(axis=1).sum()
    budget = int(low + (high - low) * ((seed * 37) % 100) / 100)
    items = np.arange(6)
    best = min(
        float(damages[items, forms].sum())
        for forms in map(list, itertools.product(range(4), repeat=6))
        if sizes[items, forms].sum() <= budget
    )
    found = choose(sizes, damages, budget)
    assert found.n_bytes == sizes[items, found.chosen].sum() <= budget
    assert found.damage == pytest.approx(damages[items, found.chosen].sum())
    assert found.bound <= best * (1 + 1e-9)
    assert best * (1 - 1e-9) <= found.damage <= best * 1.2
    assert found.damage <= found.bound * (1 + found.gap) * (1 + 1e-9)


def test_most_choices_are_the_best() -> None:
    n_best = 0
    for seed in range(40):
        sizes, damages = problem(seed, 5, 4)
        budget = int(sizes.mean(axis=1).sum())
        items = np.arange(5)
        best = min(
            float(damages[items, forms].sum())
            for forms in map(list, itertools.product(range(4), repeat=5))
            if sizes[items, forms].sum() <= budget
        )
        n_best += choose(sizes, damages, budget).damage <= best * (1 + 1e-9)
    assert n_best >= 36


@pytest.mark.parametrize("bits", [2.5, 4.25, 8])
def test_a_large_model_takes_seconds_and_fills_the_budget(bits: float) -> None:
    sizes, damages = problem(1, 480, 20)
    budget = int(sizes.max(axis=1).sum() * bits / 16)
    start = time.process_time()
    found = choose(sizes, damages, budget)
    assert time.process_time() - start < 5
    assert 0.999 * budget < found.n_bytes <= budget
    assert found.gap < 0.01
    again = choose(sizes, damages, budget)
    assert (again.chosen == found.chosen).all()


def test_with_room_for_everything_nothing_is_lost() -> None:
    sizes, damages = problem(3, 20, 6)
    found = choose(sizes, damages, int(sizes.sum()))
    assert found.damage == pytest.approx(damages.min(axis=1).sum())
    assert found.gap == pytest.approx(0, abs=1e-6)  # sums of floats


def test_a_budget_below_the_smallest_forms() -> None:
    sizes, damages = problem(4, 5, 3)
    least = int(sizes.min(axis=1).sum())
    assert choose(sizes, damages, least).n_bytes == least
    with pytest.raises(UsageError, match=rf"have {least:,}; pass a larger target"):
        choose(sizes, damages, least - 1)
