"""Neurons of experts, aligned: experts that are the same but for their order become the same."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from reap2gguf.merging.alignment import (
    activation_costs,
    assigned,
    average,
    neurons,
    principal_components,
    weight_costs,
)
from reap2gguf.merging.room import PIECE
from reap2gguf.merging.statistics import Entering, ReamSums, TtmSums

COUNT, WIDTH, HIDDEN = 4, 12, 40  # 120 weights of a neuron: more than there are components


class Experts:
    """Experts with a plain product in place of a gate."""

    def __init__(self, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> None:
        self.gate, self.up = gate, up
        self.module = SimpleNamespace(down_proj=down)
        self.n_experts, self.width = gate.shape[:2]

    def activations(self, expert: int, inputs: torch.Tensor) -> torch.Tensor:
        return torch.tanh(inputs @ self.gate[expert].T) * (inputs @ self.up[expert].T)

    def read(self, expert: int) -> list[torch.Tensor]:
        return [self.gate[expert], self.up[expert], self.module.down_proj[expert]]


def experts(seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    inputs = normal(COUNT, WIDTH, HIDDEN), normal(COUNT, WIDTH, HIDDEN)
    return Experts(*inputs, normal(COUNT, HIDDEN, WIDTH))


@pytest.mark.parametrize("by", ["weights", "activations"])
def test_an_expert_whose_neurons_were_shuffled_is_found_again(by: str) -> None:
    found = experts()
    order = torch.from_numpy(np.random.default_rng(1).permutation(WIDTH))
    found.gate[1], found.up[1] = found.gate[0][order], found.up[0][order]
    found.module.down_proj[1] = found.module.down_proj[0][:, order]
    if by == "weights":
        basis = principal_components(found.read, COUNT, map)
        (cost,) = weight_costs(found.read, (0, 1), basis)
    else:
        samples = [torch.randn(30, HIDDEN, dtype=torch.float64) for _ in range(2)]
        (cost,) = activation_costs(found, samples, (0, 1), map)
    permutation = assigned(cost)
    assert order[permutation].tolist() == list(range(WIDTH))
    merged = average([found.read(0), found.read(1)], [None, permutation], (0.25, 0.75))
    for own, expected in zip(merged, found.read(0), strict=True):
        assert torch.allclose(own, expected)


def test_costs_are_distances_of_what_numpy_projects() -> None:
    found = experts()
    basis = principal_components(found.read, COUNT, map)
    every = torch.cat([neurons(found.read(one)) for one in range(COUNT)]).numpy()
    centred = every - every.mean(0)
    _, lengths, components = np.linalg.svd(centred, full_matrices=False)
    count = min(64, len(lengths))
    reduced = centred @ (components[:count].T * lengths[:count])
    reduced /= np.linalg.norm(reduced, axis=1, keepdims=True)
    own = np.split(reduced, COUNT)
    expected = np.linalg.norm(own[2][:, None] - own[3][None], axis=-1)
    (cost,) = weight_costs(found.read, (2, 3), basis)
    assert np.allclose(cost.numpy(), expected, atol=1e-6)


def test_a_neuron_that_never_fires_has_a_cost() -> None:
    found = experts()
    found.gate[0, 3] = 0
    (cost,) = activation_costs(found, [torch.randn(9, HIDDEN, dtype=torch.float64)], (0, 1), map)
    assert torch.isfinite(cost).all()
    assert torch.allclose(cost[3], torch.ones(WIDTH, dtype=torch.float64))


def test_sums_do_not_depend_on_how_tokens_are_cut() -> None:
    found, router = experts(), torch.randn(COUNT, HIDDEN)
    inputs = torch.randn(PIECE + 30, HIDDEN, dtype=torch.float64)
    index = torch.randint(0, COUNT, (len(inputs), 2))
    whole, parts = (ReamSums.zeros(router, WIDTH) for _ in range(2))
    ttm, ttm_parts = (TtmSums.zeros(COUNT, torch.device("cpu")) for _ in range(2))
    entering = Entering(inputs, inputs, index)
    for sums in (whole, ttm):
        sums.add(entering, found, map)
    for sums in (parts, ttm_parts):
        sums.add(entering.piece(0, 1000), found, map)
        sums.add(entering.piece(1000, len(inputs)), found, map)
    assert whole.n_tokens == parts.n_tokens == ttm.n_tokens == len(inputs)
    assert torch.allclose(whole.logits_gram, parts.logits_gram)
    assert torch.allclose(whole.activations, parts.activations)
    assert torch.allclose(ttm.distances, ttm_parts.distances)
    gates = torch.softmax(inputs.float() @ router.T, dim=-1).double()
    expected = [
        (gates[:, [e]] * (found.activations(e, inputs) @ found.module.down_proj[e].T)).mean(0)
        for e in range(COUNT)
    ]
    assert torch.allclose(whole.outputs(found.module.down_proj), torch.stack(expected), atol=1e-6)
