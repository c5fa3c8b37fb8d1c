"""A layer's merge, computed with transformers' own models, numpy and scipy, as simply as can be."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist, squareform
from transformers import AutoModelForCausalLM

from tests.repairing.witness import calls


@dataclass
class Block:
    """The experts of a layer of the source, and what they do with all tokens."""

    inputs: np.ndarray  # (N, H) float64
    index: np.ndarray  # (N, K)
    gates: np.ndarray  # (N, K)
    logits: np.ndarray  # (N, E)
    activations: np.ndarray  # (E, N, F)
    outputs: np.ndarray  # (E, N, H)
    gate: np.ndarray  # (E, F, H)
    up: np.ndarray
    down: np.ndarray  # (E, H, F)

    @property
    def n_experts(self) -> int:
        return len(self.down)

    @property
    def counts(self) -> np.ndarray:
        return np.array([(self.index == expert).sum() for expert in range(self.n_experts)])


def block_of(source: Path, stream: Path, rows: list[np.ndarray], path: str) -> Block:
    """The source's experts on what reaches them in the model `stream`."""
    inputs = calls(stream, rows, path).inputs
    whole: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    modules = dict(whole.named_modules())
    name = next(name for name in modules if name.endswith(path))
    experts, block = modules[name], modules[name.rpartition(".")[0]]
    kept: list[Any] = []

    def keep(module: Any, arguments: Any, keywords: Any) -> None:
        kept.append((*arguments, *keywords.values()))

    experts.register_forward_pre_hook(keep, with_kwargs=True)
    with torch.inference_mode():
        block(torch.from_numpy(inputs).float()[None])
    _, index, gates = (one.reshape(-1, one.shape[-1]) for one in kept[0][:3])
    gate, up = experts.gate_up_proj.detach().double().chunk(2, dim=1)
    down = experts.down_proj.detach().double()
    (router,) = (
        parameter
        for name, parameter in block.named_parameters()
        if tuple(parameter.shape) == (len(down), inputs.shape[1]) and "experts" not in name
    )
    x = torch.from_numpy(inputs)
    activations = torch.stack(
        [experts.act_fn(x @ g.T) * (x @ u.T) for g, u in zip(gate, up, strict=True)]
    )
    return Block(
        inputs,
        index.numpy(),
        gates.double().numpy(),
        inputs @ router.detach().double().numpy().T,
        activations.numpy(),
        (activations @ down.transpose(1, 2)).numpy(),
        gate.numpy(),
        up.numpy(),
        down.numpy(),
    )


def reap_scores(block: Block) -> np.ndarray:
    found = np.zeros(block.n_experts)
    for expert in range(block.n_experts):
        tokens, places = np.nonzero(block.index == expert)
        if len(tokens):
            norms = np.linalg.norm(block.outputs[expert][tokens], axis=1)
            found[expert] = (block.gates[tokens, places] * norms).mean()
    return found


def reap_weights(block: Block) -> np.ndarray:
    """Scores as weights: an expert without tokens counts as the least of the others does."""
    scores = reap_scores(block)
    return np.where(scores == 0, min(0.5, scores[scores > 0].min()), scores)


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def similarity(block: Block) -> np.ndarray:
    """REAM's, pair by pair."""
    gates = softmax(block.logits)
    means = [(gates[:, [e]] * block.outputs[e]).mean(axis=0) for e in range(block.n_experts)]
    columns = [block.logits[:, e] / np.linalg.norm(block.logits[:, e]) for e in range(len(means))]
    apart = cdist(columns, columns)
    found = np.zeros((len(means), len(means)))
    for one, first in enumerate(means):
        for other, second in enumerate(means):
            cosine = first @ second / (np.linalg.norm(first) * np.linalg.norm(second))
            found[one, other] = ((cosine + 1) / 2 + 1 - apart[one, other] / apart.max()) / 2
    return found


def runs_of(block: Block, n_runs: int) -> list[list[int]]:
    """The neighbouring experts that a router with groups chooses among."""
    return [list(one) for one in np.array_split(np.arange(block.n_experts), n_runs)]


def ream_groups(block: Block, n_kept: int, group_size: int, n_runs: int) -> dict[int, list[int]]:
    """Centroids and their members; each run of the router's keeps the same number."""
    scores, alike = reap_scores(block), similarity(block)
    centroids = []
    for run in runs_of(block, n_runs):
        centroids += sorted(run, key=lambda e: -scores[e])[: n_kept // n_runs]
    centroids.sort(key=lambda e: -scores[e])
    left = set(range(block.n_experts)) - set(centroids)
    groups = {}
    for centroid in centroids:
        nearest = sorted(left, key=lambda e: -alike[centroid, e])[: group_size - 1]
        left -= set(nearest)
        groups[centroid] = sorted(nearest)
    assert not left
    return groups


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def reduced_neurons(block: Block) -> list[np.ndarray]:
    """The neurons of each expert on the principal components of all, each times its length."""
    own = [
        unit(np.concatenate([block.gate[e], block.up[e], block.down[e].T], axis=1))
        for e in range(block.n_experts)
    ]
    every = np.concatenate(own)
    centred = every - every.mean(axis=0)
    _, lengths, components = np.linalg.svd(centred, full_matrices=False)
    return np.split(centred @ (components[:64].T * lengths[:64]), block.n_experts)


def ream_matrices(
    block: Block, members: list[int], projected: list[np.ndarray], scores: np.ndarray
) -> tuple[np.ndarray, ...]:
    """Gate, up and down of a group; its first member is the centroid."""
    weights = scores[members] / scores[members].sum()
    gate, up, down = 0.0, 0.0, 0.0
    for member, weight in zip(members, weights, strict=True):
        order = np.arange(len(block.gate[member]))
        if member != members[0]:
            by_activations = cdist(
                unit(block.activations[members[0]].T), unit(block.activations[member].T)
            )
            by_weights = cdist(unit(projected[members[0]]), unit(projected[member]))
            order = linear_sum_assignment(by_activations + by_weights)[1]
        gate = gate + weight * block.gate[member][order]
        up = up + weight * block.up[member][order]
        down = down + weight * block.down[member][:, order]
    return gate, up, down


def hc_groups(block: Block, n_kept: int, n_runs: int) -> dict[int, list[int]]:
    """The most used expert of each cluster, and the others; each run of the router's by itself."""
    count = block.n_experts
    apart, used = np.zeros((count, count)), block.counts
    units = [unit(outputs) for outputs in block.outputs]
    for token, chosen in enumerate(block.index):
        for expert in chosen:
            for other in range(count):
                cosine = units[expert][token] @ units[other][token]
                apart[expert, other] += 1 - cosine
                apart[other, expert] += 1 - cosine
    apart /= np.maximum(used[:, None] + used[None], 1)
    apart *= (used[:, None] + used[None]) / used.sum()
    np.fill_diagonal(apart, 0)
    groups = {}
    for run in runs_of(block, n_runs):
        tree = linkage(squareform(apart[np.ix_(run, run)]), "average")
        labels = fcluster(tree, n_kept // n_runs, "maxclust")
        for label in set(labels):
            cluster = [run[place] for place in np.flatnonzero(labels == label)]
            centroid = max(cluster, key=lambda e: used[e])
            groups[centroid] = [one for one in cluster if one != centroid]
    return groups


def hc_matrices(block: Block, members: list[int]) -> tuple[np.ndarray, ...]:
    """Gate, up and down of a cluster."""
    weights = block.counts[members] / block.counts[members].sum()
    every = block.gate, block.up, block.down
    return tuple(np.tensordot(weights, matrices[members], 1) for matrices in every)
