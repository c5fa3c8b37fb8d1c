"""What a ratio keeps, compared with what the selection itself keeps."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reap2gguf.artifacts.observations import LayerObservation, Observations
from reap2gguf.errors import ArtifactError
from reap2gguf.models.description import ModelFacts
from reap2gguf.pruning.coverage import Coverage
from reap2gguf.pruning.inspection import Enough, inspect_bundle, inspect_observations
from reap2gguf.pruning.methods import OBSERVED
from reap2gguf.pruning.select import CRITERIA, Target, kept_at, select_experts
from tests.bundle.test_manifest import sample
from tests.pruning.test_select import facts

__all__ = ["facts"]  # a fixture


def layer(count: list[int], reap_sum: list[float]) -> LayerObservation:
    sums = np.array(reap_sum)
    return LayerObservation(np.array(count, dtype=np.int64), sums, sums, sums, sums)


def seen(*layers: LayerObservation) -> Observations:
    return Observations(dict(enumerate(layers)), "fingerprint", "text", "hash", 1, 1, 0)


def test_shares_of_scores() -> None:
    # scores 4, 3, 2, 1 and 1, 1, 1, 1
    found = inspect_observations(
        seen(layer([1, 2, 1, 0], [4, 6, 2, 0]), layer([1] * 4, [1] * 4)), "reap", (0, 0.25, 0.5)
    )
    assert [one.shares for one in found.layers] == [(1, 1, 7 / 9), (1, 0.75, 0.5)]
    assert found.layers[0].coverage == Coverage(4, 0, 1, 1, 4, 2)
    assert found.means == (1, 0.875, (7 / 9 + 0.5) / 2)
    assert found.lowest == (1, 0.75, 0.5)
    # means with 4, 3, 2 experts: 1, 0.875, 0.64
    assert found.enough == (Enough(0.95, 4, 0.0), Enough(0.9, 4, 0.0))


def test_the_fewest_experts_that_are_enough() -> None:
    found = inspect_observations(seen(layer([1] * 8, [50, 41, 5, 1, 1, 1, 1, 0])), "reap", (0.5,))
    assert found.enough == (Enough(0.95, 3, 0.625), Enough(0.9, 2, 0.75))


@settings(deadline=None)
@given(st.data())
def test_a_share_is_that_of_the_experts_that_are_selected(data: st.DataObject) -> None:
    n_experts = data.draw(st.integers(2, 12))
    values = st.lists(st.floats(0, 1e6), min_size=n_experts, max_size=n_experts)
    counts = st.lists(st.integers(0, 9), min_size=n_experts, max_size=n_experts)
    one = LayerObservation(
        np.array(data.draw(counts)), *(np.array(data.draw(values)) for _ in range(10))
    )
    method = data.draw(st.sampled_from(list(OBSERVED)))
    ratio = data.draw(st.floats(0, 0.99))
    scores = CRITERIA[method](one)
    kept = np.sort(scores)[::-1][: kept_at(ratio, n_experts)]
    (found,) = inspect_observations(seen(one), method, (ratio,)).layers
    expected = kept.sum() / scores.sum() if scores.max() > 0 else 0
    assert found.shares[0] == pytest.approx(expected, rel=1e-9)


def test_scores_near_the_largest_number() -> None:
    found = inspect_observations(seen(layer([1] * 4, [1.7e308] * 4)), "reap", (0.5,))
    assert found.means == (0.5,)


def test_layers_of_different_sizes() -> None:
    found = inspect_observations(seen(layer([1] * 4, [1] * 4), layer([1], [1])), "reap", (0.5,))
    assert [one.shares for one in found.layers] == [(0.5,), (1.0,)]
    assert found.enough == ()


def test_a_layer_that_no_token_reached() -> None:
    found = inspect_observations(seen(layer([0] * 4, [0] * 4)), "reap", (0.5,))
    assert found.means == (0,)
    assert found.enough == ()


@pytest.mark.parametrize("observations", [seen(), seen(layer([], []))])
def test_observations_of_nothing(observations: Observations) -> None:
    with pytest.raises(ArtifactError, match="hold no experts"):
        inspect_observations(observations, "reap", (0.5,))


def test_what_a_bundle_keeps(facts: ModelFacts) -> None:
    one = layer([2, 0, 1, 1], [8, 0, 3, 1])
    kept = select_experts(seen(one), "reap", Target(4, 2), replace(facts, n_experts=4))
    manifest = sample()
    manifest = replace(
        manifest, pruning=replace(manifest.pruning, n_experts=4, n_kept=2, kept=kept)
    )
    found = inspect_bundle(manifest, seen(one))
    assert found.mean == found.layers[0].share == 7 / 8
    assert found.layers[0].n_unseen_kept == 0
    assert inspect_bundle(manifest, seen(one), "frequency").mean == 3 / 4
    blind = inspect_bundle(manifest, None)
    assert blind.mean is None
    assert [one.n_kept for one in blind.layers] == [2]


@pytest.mark.parametrize("layers", [(), (layer([1] * 5, [1] * 5),)])
def test_observations_that_do_not_fit_a_bundle(layers: tuple[LayerObservation, ...]) -> None:
    with pytest.raises(ArtifactError, match="does not have the 16 experts of the manifest"):
        inspect_bundle(sample(), seen(*layers))
