"""Solves (A + lambda I) X = B for a symmetric A that is held in tiles, or not held at all.

In tiles: a left-looking Cholesky factorization, then refinement by residuals in float64, where the
factor is float32 (Higham, Accuracy and Stability of Numerical Algorithms, chapters 10 and 12). The
tiles may wait in host memory while a GPU computes: each is copied when it is needed.

Not held: conjugate gradients, whose preconditioner is the diagonal blocks (block Jacobi).

Letters: n unknowns per column, H columns of B, b tile size. Memory beside A: a factor as large as
the tiles of A, and five arrays (n, H).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from reap2gguf.repairing.features import Map

NotPositiveDefinite = torch.linalg.LinAlgError  # type: ignore[attr-defined]
Place = tuple[int, int]  # of a tile: row and column
_REFINEMENTS = 5
_REFINED = 1e-7  # residual relative to B: far below what bfloat16 and float16 can store
MOST_STEPS = 300
# a residual relative to B at which conjugate gradients stop
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-6}


@dataclass
class Tiles:
    """The lower triangle of a symmetric matrix, or a lower triangular one, in square tiles."""

    bounds: Sequence[slice]  # of the tiles' rows
    device: torch.device  # where they are computed with
    store: torch.device  # where they wait
    held: dict[Place, Tensor] = field(default_factory=dict)

    @property
    def n(self) -> int:
        return int(self.bounds[-1].stop)

    def __getitem__(self, place: Place) -> Tensor:
        return self.held[place].to(self.device)

    def __setitem__(self, place: Place, tile: Tensor) -> None:
        self.held[place] = tile.to(self.store)

    def diagonal_mean(self) -> float:
        """The mean of the diagonal."""
        found = (self[i, i].diagonal().double().sum() for i in range(len(self.bounds)))
        return float(sum(float(one) for one in found)) / self.n

    def multiply(self, values: Tensor) -> Tensor:
        """The whole symmetric matrix times (n, H), in the type of `values`."""
        found = torch.zeros_like(values)
        for (i, j), _ in sorted(self.held.items(), key=lambda one: one[0]):
            tile = self[i, j].to(values.dtype)
            found[self.bounds[i]] += tile @ values[self.bounds[j]]
            if i != j:
                found[self.bounds[j]] += tile.t() @ values[self.bounds[i]]
        return found


@torch.inference_mode()
def factored(matrix: Tiles, shift: float, each: Map) -> Tiles:
    """The Cholesky factor of the matrix plus `shift` times the identity.

    Raises NotPositiveDefinite if it is not positive definite in the type of its tiles.
    """
    factor = Tiles(matrix.bounds, matrix.device, matrix.store)
    count = len(matrix.bounds)
    for j in range(count):
        row = [factor[j, k] for k in range(j)]

        def rest(i: int, j: int = j, row: Sequence[Tensor] = row) -> Tensor:
            tile = matrix[i, j].clone()
            for k, part in enumerate(row):
                tile.addmm_(part if i == j else factor[i, k], part.t(), alpha=-1)
            return tile

        corner = rest(j)
        corner.diagonal().add_(shift)
        factor[j, j] = corner = torch.linalg.cholesky(corner)

        def below(i: int, rest: Callable[[int], Tensor] = rest, corner: Tensor = corner) -> Tensor:
            solved: Tensor = torch.linalg.solve_triangular(corner, rest(i).t(), upper=False)
            return solved.t().contiguous()

        for i, tile in zip(range(j + 1, count), each(below, range(j + 1, count)), strict=True):
            factor[i, j] = tile
    return factor


@torch.inference_mode()
def back_substituted(factor: Tiles, right: Tensor) -> Tensor:
    """What a factored matrix gives for the right side (n, H)."""
    found, bounds = right.clone(), factor.bounds
    count = len(bounds)
    for i in range(count):
        for k in range(i):
            found[bounds[i]] -= factor[i, k] @ found[bounds[k]]
        found[bounds[i]] = torch.linalg.solve_triangular(
            factor[i, i], found[bounds[i]], upper=False
        )
    for i in reversed(range(count)):
        for k in range(i + 1, count):
            found[bounds[i]] -= factor[k, i].t() @ found[bounds[k]]
        found[bounds[i]] = torch.linalg.solve_triangular(
            factor[i, i].t(), found[bounds[i]], upper=True
        )
    return found


@torch.inference_mode()
def solved(matrix: Tiles, shift: float, right: Tensor, each: Map) -> Tensor:
    """X of (matrix + shift I) X = right (n, H), refined where the tiles are float32.

    Raises NotPositiveDefinite as `factored` does.
    """
    factor = factored(matrix, shift, each)
    found = back_substituted(factor, right)
    if right.dtype == torch.float64:
        return found
    exact, goal = right.double(), _REFINED * float(right.double().norm())
    precise = found.double()
    for _ in range(_REFINEMENTS):
        residual = exact - matrix.multiply(precise) - shift * precise
        if float(residual.norm()) <= goal:
            break
        precise += back_substituted(factor, residual.to(right.dtype)).double()
    return precise.to(right.dtype)


@torch.inference_mode()
def conjugate_gradients(
    multiply: Callable[[Tensor], Tensor],
    blocks: Tensor,
    right: Tensor,
    start: Tensor | None = None,
) -> Tensor:
    """X of A X = right (n, H), where `multiply` is A times such an array.

    `blocks` (m, b, b) are the diagonal blocks of A. Each column has steps of its own length. Ends
    when the residual of all columns together is small enough, or after many steps.
    """
    factors = torch.linalg.cholesky(blocks)

    def preconditioned(values: Tensor) -> Tensor:
        parts = values.view(len(blocks), -1, values.shape[1])
        return torch.cholesky_solve(parts, factors).reshape(values.shape)

    found = torch.zeros_like(right) if start is None else start.clone()
    residual = right.clone() if start is None else right - multiply(found)
    goal = TOLERANCE[right.dtype] * float(right.norm())
    direction = preconditioned(residual)
    energy = (residual * direction).sum(0)
    for _ in range(MOST_STEPS):
        if float(residual.norm()) <= goal:
            break
        image = multiply(direction)
        step = _ratio(energy, (direction * image).sum(0))
        found += step * direction
        residual -= step * image
        ahead = preconditioned(residual)
        before, energy = energy, (residual * ahead).sum(0)
        direction = ahead + _ratio(energy, before) * direction
    return found


def _ratio(top: Tensor, bottom: Tensor) -> Tensor:
    """`top` / `bottom`, and zero where a column is solved and both are zero."""
    return torch.where(bottom > 0, top / bottom.clamp_min(torch.finfo(top.dtype).tiny), 0)
