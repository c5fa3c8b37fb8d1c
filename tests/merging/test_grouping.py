"""Groups and clusters of experts, against scipy and by hand."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform

from reap2gguf.merging.grouping import (
    average_linkage,
    cosine_similarity,
    gated_similarity,
    hc_groups,
    merge_weights,
    penalised,
    ream_groups,
    ttm_distances,
)
from reap2gguf.merging.merge import Group


@pytest.mark.parametrize("seed", range(8))
def test_average_linkage_is_scipys(seed: int) -> None:
    generator = np.random.default_rng(seed)
    points = generator.normal(size=(12, 4))
    apart = np.linalg.norm(points[:, None] - points[None], axis=-1)
    for n_clusters in (1, 3, 6, 12):
        labels = fcluster(linkage(squareform(apart), "average"), n_clusters, "maxclust")
        expected = {tuple(np.flatnonzero(labels == label).tolist()) for label in set(labels)}
        assert set(map(tuple, average_linkage(apart, n_clusters))) == expected


def test_the_most_salient_centroid_chooses_first_and_the_last_stays_alone() -> None:
    weights = np.array([5.0, 1.0, 4.0, 1.0, 3.0, 0.5])
    alike = np.zeros((6, 6))
    alike[0, [1, 3, 5]] = 0.9, 0.2, 0.8
    alike[2, [1, 3, 5]] = 0.9, 0.5, 0.6
    groups = ream_groups(weights, alike, (0, 2, 4), 3)
    assert [one.members for one in groups] == [(0, 1, 5), (2, 3), (4,)]
    assert groups[0].shares == pytest.approx((5 / 6.5, 1 / 6.5, 0.5 / 6.5))
    assert groups[2] == Group((4,), (1.0,))
    assert [one.is_merged for one in groups] == [True, True, False]
    alone = ream_groups(weights, alike, (0, 2, 4), 3, alone=(0,))
    assert [one.members for one in alone] == [(0,), (2, 1, 5), (4, 3)]


def test_an_expert_without_tokens_has_the_least_weight() -> None:
    assert merge_weights(np.array([0.0, 0.3, 0.2])).tolist() == [0.2, 0.3, 0.2]
    assert merge_weights(np.array([0.0, 3.0])).tolist() == [0.5, 3.0]
    assert merge_weights(np.zeros(2)).tolist() == [1.0, 1.0]


def test_similarity_is_between_0_and_1_and_1_of_an_expert_with_itself() -> None:
    generator = np.random.default_rng(0)
    outputs, logits = generator.normal(size=(5, 7)), generator.normal(size=(40, 5))
    found = gated_similarity(outputs, logits.T @ logits)
    assert np.allclose(np.diag(found), 1)
    assert np.allclose(found, found.T)
    assert found.min() >= 0
    assert cosine_similarity(np.zeros((2, 3))).tolist() == [[0, 0], [0, 0]]


def test_distances_are_means_over_the_tokens_of_either_expert() -> None:
    sums, counts = np.array([[0.0, 3.0], [1.0, 0.0]]), np.array([6.0, 2.0])
    assert ttm_distances(sums, counts).tolist() == [[0, 0.5], [0.5, 0]]
    assert ttm_distances(np.zeros((2, 2)), np.zeros(2)).tolist() == [[0, 0], [0, 0]]
    assert penalised(np.array([[0, 0.5], [0.5, 0]]), counts).tolist() == [[0, 0.5], [0.5, 0]]


def test_clusters_of_each_run_of_the_routers_and_of_experts_that_are_alone() -> None:
    apart = np.ones((6, 6))
    apart[1, 2] = apart[2, 1] = 0.1
    apart[3, 5] = apart[5, 3] = 0.2
    apart[0, 4] = apart[4, 0] = 0.0  # of two runs: they never become one
    counts = np.array([1.0, 2.0, 6.0, 4.0, 3.0, 4.0])
    found = hc_groups(apart, counts, 4, 2)
    assert [one.members for one in found] == [(0,), (2, 1), (3, 5), (4,)]
    assert found[1].shares == (0.75, 0.25)
    alone = hc_groups(apart, counts, 4, 2, alone=(2, 5))
    assert [one.members for one in alone] == [(1, 0), (2,), (3, 4), (5,)]
    unused = hc_groups(apart, np.zeros(6), 2, 1)
    assert all(sum(one.shares) == pytest.approx(1) for one in unused)
