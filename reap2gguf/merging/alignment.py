"""Which neuron of an expert goes to which of another: REAM's alignment before an average.

The neurons of an expert have no order, so two experts that do the same may have it in another one.
Each member's neurons are assigned to those of its centroid by the Hungarian method. The cost of a
pair is the distance of their activations on the same tokens, as vectors of length 1, plus that of
their weights: rows of gate and up and the column of down, of length 1 together, on the principal
components of all neurons of the layer, each times its singular value, and of length 1 again.

Letters: E experts, F neurons (the expert width), D weights of a neuron (3 H), S sampled tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

if TYPE_CHECKING:
    from reap2gguf.repairing.features import Map, ModuleExperts

COMPONENTS = 64  # as REAM's authors have it
_EPS = 1e-8
_BLOCK = 512  # columns of the covariance that a thread computes at once
ReadMatrices = Callable[[int], Sequence[Tensor]]  # gate, up (F, H) and down (H, F) of an expert
Permutation = npt.NDArray[np.int64]


def neurons(matrices: Sequence[Tensor]) -> Tensor:
    """The neurons of an expert as vectors of length 1, (F, D) float64; the last matrix is down."""
    *inputs, down = (matrix.double() for matrix in matrices)
    return _unit(torch.cat([*inputs, down.T], dim=1))


def _unit(rows: Tensor) -> Tensor:
    lengths: Tensor = rows.norm(dim=1, keepdim=True)
    return rows / (lengths + _EPS)


def principal_components(read: ReadMatrices, n_experts: int, each: Map) -> tuple[Tensor, Tensor]:
    """Mean (D,) of the neurons of all experts, and the components to project them on (D, r).

    The components are orthogonal, each as long as its singular value.
    """
    first = neurons(read(0))
    size, count = first.shape[1], n_experts * len(first)
    total = first.new_zeros(size)
    products = first.new_zeros(size, size)
    for expert in range(n_experts):
        rows = first if expert == 0 else neurons(read(expert))
        total += rows.sum(0)
        # blocks of the upper triangle, each by one thread
        for _ in each(partial(_add_block, products, rows), range(0, size, _BLOCK)):
            pass
    mean = total / count
    lower = torch.triu(products, 1).T
    covariance = torch.triu(products) + lower - count * torch.outer(mean, mean)
    squares, vectors = torch.linalg.eigh(covariance)
    most = min(COMPONENTS, size, count)
    lengths = squares[-most:].clamp_min(0).sqrt()
    return mean, vectors[:, -most:] * lengths


def _add_block(products: Tensor, rows: Tensor, first: int) -> None:
    """Add rows' products to some columns of the upper triangle."""
    last = min(first + _BLOCK, rows.shape[1])
    products[:last, first:last] += rows[:, :last].T @ rows[:, first:last]


def distances(one: Tensor, other: Tensor) -> Tensor:
    """Euclidean distances of rows (F, ·) with each other, (F, F)."""
    return _apart(one.square().sum(1), other.square().sum(1), one @ other.T)


def _apart(one: Tensor, other: Tensor, products: Tensor) -> Tensor:
    return (one[:, None] + other[None] - 2 * products).clamp_min(0).sqrt()


def weight_costs(
    read: ReadMatrices, members: Sequence[int], basis: tuple[Tensor, Tensor]
) -> list[Tensor]:
    """Distances of the first member's neurons from those of each other one, by their weights."""
    mean, components = basis

    def projected(expert: int) -> Tensor:
        return _unit((neurons(read(expert)) - mean) @ components)

    centroid = projected(members[0])
    return [distances(centroid, projected(member)) for member in members[1:]]


def activation_costs(
    experts: ModuleExperts, samples: Sequence[Tensor], members: Sequence[int], each: Map
) -> list[Tensor]:
    """The same by their activations on the same tokens; `samples` are inputs (s, H)."""
    others = members[1:]
    width, device = experts.width, experts.module.down_proj.device
    shape = len(others), width, width
    products = torch.zeros(shape, dtype=torch.float64, device=device)
    squares = torch.zeros(len(members), width, dtype=torch.float64, device=device)
    for inputs in samples:
        first = experts.activations(members[0], inputs).double()
        squares[0] += first.square().sum(0)

        def compared(member: int, inputs: Tensor = inputs, first: Tensor = first) -> Tensor:
            own = experts.activations(member, inputs).double()
            return torch.cat([first.T @ own, own.square().sum(0)[None]])

        for number, found in enumerate(each(compared, others)):
            products[number] += found[:-1]
            squares[number + 1] += found[-1]
    norms = squares.sqrt() + _EPS
    units = squares / norms.square()  # squared lengths of what was divided by them
    return [
        _apart(units[0], units[number + 1], products[number] / torch.outer(norms[0], norm))
        for number, norm in enumerate(norms[1:])
    ]


def assigned(cost: Tensor) -> Permutation:
    """For each row, the column that the cheapest assignment of all rows gives it."""
    from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]

    _, columns = linear_sum_assignment(cost.cpu().numpy())
    return np.asarray(columns, dtype=np.int64)


def average(
    matrices: Sequence[Sequence[Tensor]],
    permutations: Sequence[Permutation | None],
    shares: Sequence[float],
) -> list[Tensor]:
    """Each projection's average over members, float64; down is the last and has neurons as columns.

    permutations: for each member, its neuron that goes to each place; None: as they are
    """
    found: list[Tensor] = []
    for own, permutation, share in zip(matrices, permutations, shares, strict=True):
        *inputs, down = (matrix.double() for matrix in own)
        if permutation is not None:
            order = torch.from_numpy(permutation).to(down.device)
            inputs, down = [matrix[order] for matrix in inputs], down[:, order]
        weighted = [share * matrix for matrix in (*inputs, down)]
        found = weighted if not found else [a + b for a, b in zip(found, weighted, strict=True)]
    return found
