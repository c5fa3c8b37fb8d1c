"""Which experts become one: REAM's pseudo-pruning, and the clusters of HC-SMoE.

REAM (arXiv 2604.04356; its authors' program is SamsungSAILMontreal/ream): the experts with the
highest REAP scores are centroids. From the highest down, each takes the nearest experts that are
neither centroids nor taken, until its group has C experts. So a few groups are large, and most are
their centroid alone. Experts are similar if their outputs are, each times what the router's softmax
gives it, and if the router's logits for them are.

HC-SMoE (arXiv 2410.08589), as CerebrasResearch/reap runs it with `ttm` and a frequency penalty:
agglomerative clusters with average linkage. The distance of two experts is the mean of 1 - cosine
of their outputs, over the tokens that are routed to either, times the sum of their shares of all
routed tokens: what is rarely used is merged first. The most used expert of a cluster stays.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt

from reap2gguf.merging.merge import Group

Floats = npt.NDArray[np.float64]
_EPS = 1e-8


def cosine_similarity(vectors: Floats) -> Floats:
    """Cosines of rows (E, H) with each other, (E, E)."""
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), _EPS)
    found: Floats = np.clip(unit @ unit.T, -1, 1)
    return found


def gated_similarity(outputs: Floats, logits_gram: Floats) -> Floats:
    """REAM's similarity of experts, (E, E), from 0 to 1.

    outputs: (E, H), the mean of the gated outputs over all tokens    logits_gram: (E, E), the sums
    over tokens of products of the router's logits
    """
    by_output = (cosine_similarity(outputs) + 1) / 2
    norms = np.sqrt(np.diag(logits_gram))
    shrunk = norms / (norms + _EPS)  # the norm of a row of logits, once it is normalised
    cosines = logits_gram / np.outer(norms + _EPS, norms + _EPS)
    squares = shrunk[:, None] ** 2 + shrunk[None] ** 2 - 2 * cosines
    distances = np.sqrt(np.maximum(squares, 0))
    np.fill_diagonal(distances, 0)
    by_logits = 1 - distances / max(float(distances.max()), _EPS)
    similarity: Floats = (by_output + by_logits) / 2
    return similarity


def merge_weights(scores: Floats) -> Floats:
    """REAP scores (E,) as weights of an average: an expert that no token reached has the least.

    As REAM's authors do it: at most 0.5, so that such an expert can be merged.
    """
    found = scores > 0
    least = min(0.5, float(scores[found].min())) if found.any() else 1.0
    return np.where(found, scores, least)


def ream_groups(
    weights: Floats,
    similarity: Floats,
    kept: Sequence[int],
    group_size: int,
    alone: Collection[int] = (),
) -> tuple[Group, ...]:
    """The groups around the centroids `kept`; those that are `alone` take no other expert.

    weights: (E,), by which centroids are served and members averaged    similarity: (E, E)
    There must be room for all experts (`limits.check_merge`).
    """
    members = {centroid: [centroid] for centroid in kept}
    free = np.ones(len(weights), dtype=bool)
    free[list(kept)] = False
    for centroid in sorted(kept, key=lambda one: (-weights[one], one)):
        if centroid in alone:
            continue
        nearest = np.argsort(-similarity[centroid], kind="stable")
        taken = nearest[free[nearest]][: group_size - 1]
        free[taken] = False
        members[centroid] += sorted(taken.tolist())
    assert not free.any(), "no room for all experts"
    return tuple(_group(members[centroid], weights) for centroid in sorted(kept))


def _group(members: Sequence[int], weights: Floats) -> Group:
    chosen = weights[list(members)]
    total = chosen.sum()
    shares = chosen / total if total > 0 else np.full(len(members), 1 / len(members))
    return Group(tuple(members), tuple(shares.tolist()))


def penalised(distances: Floats, counts: Floats) -> Floats:
    """Distances (E, E) times the sum of both experts' shares of the routed tokens `counts` (E,)."""
    shares = counts / max(float(counts.sum()), 1.0)
    found: Floats = distances * (shares[:, None] + shares[None])
    return found


def ttm_distances(sums: Floats, counts: Floats) -> Floats:
    """Mean of 1 - cosine of two experts' outputs, over the tokens of either, (E, E).

    sums: (E, E), over the tokens that are routed to the row's expert    counts: (E,) tokens
    Two experts without tokens are at distance 0.
    """
    both = counts[:, None] + counts[None]
    found: Floats = (sums + sums.T) / np.maximum(both, 1)
    np.fill_diagonal(found, 0)
    return found


def average_linkage(distances: Floats, n_clusters: int) -> list[list[int]]:
    """Agglomerative clusters: the two at the least mean distance become one, again and again.

    Of equal distances the first pair counts.
    """
    clusters = [[one] for one in range(len(distances))]
    apart = distances.astype(float, copy=True)
    np.fill_diagonal(apart, np.inf)
    while len(clusters) > n_clusters:
        one, other = sorted(np.unravel_index(int(np.argmin(apart)), apart.shape))
        sizes = len(clusters[one]), len(clusters[other])
        joined = (sizes[0] * apart[one] + sizes[1] * apart[other]) / sum(sizes)
        joined[one] = np.inf
        apart[one], apart[:, one] = joined, joined
        apart = np.delete(np.delete(apart, other, 0), other, 1)
        clusters[one] += clusters.pop(other)
    return [sorted(cluster) for cluster in clusters]


def hc_groups(
    distances: Floats, counts: Floats, n_kept: int, n_groups: int, alone: Collection[int] = ()
) -> tuple[Group, ...]:
    """Clusters of each of the router's `n_groups` runs of experts; the most used member stays.

    distances: (E, E)    counts: (E,) tokens    n_kept: clusters in all runs together
    An expert that is `alone` is a cluster by itself.
    """
    size, found = len(counts) // n_groups, []
    for first in range(0, len(counts), size):
        ids = np.array([one for one in range(first, first + size) if one not in alone])
        by_themselves = [one for one in range(first, first + size) if one in alone]
        n_clusters = n_kept // n_groups - len(by_themselves)
        clusters = average_linkage(distances[np.ix_(ids, ids)], n_clusters) if len(ids) else []
        found += [ids[cluster].tolist() for cluster in clusters]
        found += [[one] for one in by_themselves]
    ordered = []
    for cluster in found:
        centroid = min(cluster, key=lambda one: (-counts[one], one))
        ordered.append([centroid, *sorted(one for one in cluster if one != centroid)])
    return tuple(_group(members, counts) for members in sorted(ordered))
