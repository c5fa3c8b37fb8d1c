"""Layers of random experts with rows that are routed to them, and plain Phi of them in numpy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from reap2gguf.repairing.features import Features, RoutedRows

N_EXPERTS, WIDTH, HIDDEN, TOP_K = 5, 6, 10, 2


@dataclass(frozen=True)
class HeldRows:
    """Rows in memory."""

    batches: Sequence[RoutedRows]

    @property
    def n_rows(self) -> int:
        return sum(map(len, self.batches))

    @property
    def target_square(self) -> float:
        return sum(rows.target_square for rows in self.batches)

    def __iter__(self) -> Iterator[RoutedRows]:
        return iter(self.batches)


@dataclass(frozen=True)
class RandomExperts:
    """Experts whose activations are tanh of a product: any function will do."""

    weights: torch.Tensor  # (E, F, H)

    @property
    def n_experts(self) -> int:
        return len(self.weights)

    @property
    def width(self) -> int:
        return self.weights.shape[1]

    def activations(self, expert: int, inputs: torch.Tensor) -> torch.Tensor:
        return torch.tanh(inputs @ self.weights[expert].T)


@dataclass(frozen=True)
class Layer:
    """Batches of rows of one layer, for a repair and for a direct computation."""

    features: Features
    index: list[np.ndarray]
    original: torch.Tensor  # D0 (E F, H)

    def phi(self) -> np.ndarray:
        """Phi of all rows, (N, E F), row by row."""
        found = []
        experts: Any = self.features.experts
        for rows, index in zip(self.features.rows, self.index, strict=True):
            gates, inputs = rows.gates.double().numpy(), rows.inputs.double().numpy()
            for row in range(len(rows)):
                line = np.zeros(experts.n_experts * experts.width)
                for place in range(index.shape[1]):
                    expert = index[row, place]
                    part = slice(expert * experts.width, (expert + 1) * experts.width)
                    weights = experts.weights[expert].double().numpy()
                    line[part] = gates[row, place] * np.tanh(weights @ inputs[row])
                found.append(line)
        return np.stack(found)

    def errors(self) -> np.ndarray:
        return np.concatenate([rows.errors.double().numpy() for rows in self.features.rows])


def random_layer(
    *lengths: int, seed: int = 0, dtype: torch.dtype = torch.float64, unseen: int | None = None
) -> Layer:
    """Batches of these lengths; no row is routed to the expert `unseen`."""
    generator = np.random.default_rng(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.from_numpy(generator.normal(size=shape)).to(dtype)

    experts = RandomExperts(normal(N_EXPERTS, WIDTH, HIDDEN))
    original = normal(N_EXPERTS * WIDTH, HIDDEN)
    chosen_from = [one for one in range(N_EXPERTS) if one != unseen]
    batches, indices = [], []
    for length in lengths:
        index = np.stack(
            [generator.choice(chosen_from, TOP_K, replace=False) for _ in range(length)]
        )
        gates = torch.from_numpy(generator.uniform(0.1, 1, (length, TOP_K))).to(dtype)
        inputs, errors = normal(length, HIDDEN), normal(length, HIDDEN)
        batches.append(RoutedRows.of(inputs, torch.from_numpy(index), gates, errors, N_EXPERTS))
        indices.append(index)
    features = Features(experts, HeldRows(batches), torch.device("cpu"), torch.float64, map)
    return Layer(features, indices, original)
