"""Scores of experts from their weights alone: a first guess, for which nothing is observed.

`aimer` is AIMER (arXiv 2603.18492): over all weights of an expert, the mean magnitude divided by
the root mean square. It is 1 if all magnitudes are equal, and low if few weights are much larger
than the others; experts with low values stay. A score here is 1 minus it, so that high scores stay
as by every other method.

`weight_norms` is this program's own: the Frobenius norm of the gate and up matrices together, times
that of the down matrix, times the L2 norm of the expert's row of the router. The first two bound
the size of an output, the third how strongly the router can ask for it.

Weights are read once; each thread holds 12 MiB of them. Sums are float64, and no thread adds to
what another has added to, so equal weights give equal scores.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from reap2gguf.disk.threads import share_out
from reap2gguf.errors import CheckpointError
from reap2gguf.models.description import Expert, Router

if TYPE_CHECKING:
    import numpy.typing as npt

    from reap2gguf.checkpoint.weights import Weights
    from reap2gguf.models.contract import MoeModel
    from reap2gguf.progress import Progress
    from reap2gguf.pruning.select import Scores

_VALUES = 2**20  # read at a time
_INPUT, _DOWN = ("gate", "up", "gate_up"), ("down",)


@dataclass(frozen=True)
class _Matrix:
    """One expert's matrix in a stored tensor, which may hold those of all experts on axis 0."""

    stored: str
    role: Expert
    expert: int
    entry: int | None


@dataclass
class _Sums:
    """Per expert of a layer, over the weights of one projection, or of the router's row."""

    magnitudes: npt.NDArray[np.float64]
    squares: npt.NDArray[np.float64]
    counts: npt.NDArray[np.int64]

    @classmethod
    def of(cls, n_experts: int) -> _Sums:
        return cls(np.zeros(n_experts), np.zeros(n_experts), np.zeros(n_experts, np.int64))


@dataclass
class _Layer:
    """What is known of one layer."""

    n_experts: int
    router: Scores
    projections: dict[str, _Sums] = field(default_factory=dict)

    def total(self, names: tuple[str, ...]) -> _Sums:
        """The sums of several projections together, in this order."""
        total = _Sums.of(self.n_experts)
        for found in (self.projections[name] for name in names if name in self.projections):
            total.magnitudes += found.magnitudes
            total.squares += found.squares
            total.counts += found.counts
        return total

    def scores(self, method: str) -> Scores:
        if method == "weight_norms":
            norms: Scores = np.sqrt(self.total(_INPUT).squares * self.total(_DOWN).squares)
            return norms * self.router
        every = self.total(_INPUT + _DOWN)
        root = np.sqrt(every.squares / np.maximum(every.counts, 1))
        mean = every.magnitudes / np.maximum(every.counts, 1)
        # an expert whose weights are all zero has nothing to keep
        ratio = np.divide(mean, root, out=np.ones(self.n_experts), where=root != 0)
        scores: Scores = np.maximum(1 - ratio, 0)
        return scores


def weight_scores(
    weights: Weights, model: MoeModel, method: str, progress: Progress, n_threads: int = 1
) -> dict[int, Scores]:
    """The score of each expert by layer, (E,), from the weights alone; the highest are kept.

    Raises CheckpointError if weights cannot be read, are no floats, or are not finite.
    """
    n_experts = model.facts.n_experts
    layers = {
        layer: _Layer(n_experts, np.zeros(n_experts)) for layer in sorted(model.facts.moe_layers)
    }
    matrices = list(_matrices(weights, model))
    for matrix in matrices:
        layers[matrix.role.layer].projections[matrix.role.projection] = _Sums.of(n_experts)
    weights.fetch_ahead({matrix.stored for matrix in matrices})
    total = sum(_n_values(weights, one) for one in matrices)
    with progress.task("Reading the experts' weights", total, "weights") as task:

        def work(matrix: _Matrix) -> None:
            _add(weights, matrix, layers[matrix.role.layer].projections[matrix.role.projection])
            task.advance(_n_values(weights, matrix))

        share_out(work, iter(matrices), n_threads)
    if method == "weight_norms":
        _read_routers(weights, model, layers)
    found = {layer: one.scores(method) for layer, one in layers.items()}
    for layer, scores in found.items():
        if len(bad := np.flatnonzero(~np.isfinite(scores))):
            raise CheckpointError(
                f"{weights.shown}: layer {layer}: the weights of expert {bad[0]} are not finite "
                f"(those of {len(bad)} of {n_experts} experts); the checkpoint is damaged"
            )
    return found


def _matrices(weights: Weights, model: MoeModel) -> Iterator[_Matrix]:
    for name in weights.tensors:
        role = model.role(name)
        if not isinstance(role, Expert) or role.part != "weight":
            continue
        if role.expert is not None:
            yield _Matrix(name, role, role.expert, None)
        else:
            for expert in range(model.facts.n_experts):
                yield _Matrix(name, role, expert, expert)


def _n_values(weights: Weights, matrix: _Matrix) -> int:
    shape = weights.tensors[matrix.stored].shape
    return prod(shape if matrix.entry is None else shape[1:])


def _add(weights: Weights, matrix: _Matrix, sums: _Sums) -> None:
    """Add the weights of one matrix to the sums of its expert."""
    shape = weights.tensors[matrix.stored].shape
    n_rows, *others = shape if matrix.entry is None else shape[1:]
    step = max(1, _VALUES // max(1, prod(others)))
    for first in range(0, n_rows, step):
        last = min(first + step, n_rows)
        values = weights.read_float32(matrix.stored, first, last, matrix.entry)
        exact = np.abs(values, dtype=np.float64)
        sums.magnitudes[matrix.expert] += exact.sum()
        np.square(exact, out=exact)
        sums.squares[matrix.expert] += exact.sum()
        sums.counts[matrix.expert] += exact.size


def _read_routers(weights: Weights, model: MoeModel, layers: dict[int, _Layer]) -> None:
    """The L2 norm of each expert's row of the router; biases are not counted."""
    for name, stored in weights.tensors.items():
        role = model.role(name)
        if isinstance(role, Router) and role.axis == 0 and len(stored.shape) == 2:
            rows = weights.read_float32(name).astype(np.float64)
            layers[role.layer].router = np.linalg.norm(rows, axis=1)
