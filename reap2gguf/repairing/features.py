"""What a repair regresses on: the routed activations of a layer's experts, never all at once.

Phi (N, E F) has a row per token. In it, expert e's F columns are its gate weight times its
activations, such as `silu(x G_e^T) * (x U_e^T)`, or zero if the token is not routed to it. Then the
routed sum of the experts is Phi D, where D (E F, H) stacks their transposed `down_proj`.

Letters: N rows (tokens), K experts per token, E experts, H hidden (or the latent that experts have
in its place), F expert width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import linear

from reap2gguf.observing.compute.experts import activated, first_matrices

T = TypeVar("T")
R = TypeVar("R")


class Map(Protocol):
    """`map`, or one that runs in several threads and keeps the order."""

    def __call__(self, function: Callable[[T], R], items: Iterable[T], /) -> Iterator[R]: ...


class Experts(Protocol):
    """The experts of a layer up to their `down_proj`."""

    @property
    def n_experts(self) -> int: ...

    @property
    def width(self) -> int: ...

    def activations(self, expert: int, inputs: Tensor) -> Tensor:
        """What an expert's `down_proj` multiplies, (n, F), for inputs (n, H)."""


@dataclass(frozen=True)
class ModuleExperts:
    """The experts of a module of transformers, whose own code gates them."""

    module: Any

    @property
    def n_experts(self) -> int:
        return int(self.module.down_proj.shape[0])

    @property
    def width(self) -> int:
        return int(self.module.down_proj.shape[2])

    def activations(self, expert: int, inputs: Tensor) -> Tensor:
        weight = first_matrices(self.module)[expert].to(inputs.dtype)
        return activated(self.module, linear(inputs, weight))


@dataclass(frozen=True)
class RoutedRows:
    """Tokens of a layer: what enters its experts, to which, and what their sum lacks."""

    inputs: Tensor  # (n, H)
    gates: Tensor  # (n, K)
    order: Tensor  # (n K,) int64: entries of `gates`, flat, sorted by expert
    ends: tuple[int, ...]  # where each expert's entries end
    errors: Tensor  # (n, H): the target less the routed sum
    target_square: float = 0.0  # sum of squares of the targets

    @classmethod
    def of(
        cls, inputs: Tensor, index: Tensor, gates: Tensor, errors: Tensor, n_experts: int
    ) -> RoutedRows:
        """Rows whose router chose the experts `index` (n, K)."""
        ids, order = torch.sort(index.reshape(-1), stable=True)
        experts = torch.arange(n_experts, dtype=ids.dtype, device=ids.device)
        ends = torch.searchsorted(ids, experts, right=True)
        return cls(inputs, gates, order, tuple(ends.tolist()), errors)

    def __len__(self) -> int:
        return len(self.inputs)

    def to(self, device: torch.device) -> RoutedRows:
        """The same on another device; itself if it is there."""
        return replace(
            self,
            inputs=self.inputs.to(device),
            gates=self.gates.to(device),
            order=self.order.to(device),
            errors=self.errors.to(device),
        )

    def pairs(self, expert: int) -> tuple[Tensor, Tensor]:
        """The rows that are routed to an expert, ascending, and their gate weights."""
        begin = self.ends[expert - 1] if expert else 0
        chosen = self.order[begin : self.ends[expert]]
        top_k = self.gates.shape[1]
        return torch.div(chosen, top_k, rounding_mode="floor"), self.gates.reshape(-1)[chosen]


class Rows(Protocol):
    """Rows of a layer, a batch at a time."""

    @property
    def n_rows(self) -> int: ...

    @property
    def target_square(self) -> float:
        """Sum of squares of the targets, which errors are relative to."""

    def __iter__(self) -> Iterator[RoutedRows]: ...


@dataclass(frozen=True)
class Features:
    """Phi of some rows, in parts: its products are computed expert by expert.

    `work`: the type of results, float64 on a CPU and float32 on a GPU. Factors keep the type that
    the layer computes in, whose products the sums hold exactly, or nearly so.
    """

    experts: Experts
    rows: Rows
    device: torch.device
    work: torch.dtype
    each: Map

    @property
    def n_columns(self) -> int:
        return self.experts.n_experts * self.experts.width

    @property
    def n_rows(self) -> int:
        return self.rows.n_rows

    def columns(self, expert: int) -> slice:
        """The columns of one expert."""
        width = self.experts.width
        return slice(expert * width, (expert + 1) * width)

    def _of(self, rows: RoutedRows, expert: int) -> tuple[Tensor, Tensor]:
        """The rows that are routed to an expert, and their (n, F) of Phi, in the layer's type."""
        chosen, gates = rows.pairs(expert)
        activations = self.experts.activations(expert, rows.inputs[chosen])
        return chosen, activations * gates[:, None].to(activations.dtype)

    def dense(self, rows: RoutedRows, experts: range) -> Tensor:
        """The columns of neighbouring experts, (n, experts F), in the type that is multiplied."""
        width = self.experts.width
        dtype = rows.inputs.dtype if rows.inputs.is_cuda else self.work
        found = torch.zeros(len(rows), len(experts) * width, dtype=dtype, device=self.device)
        for place, expert in enumerate(experts):
            chosen, values = self._of(rows, expert)
            found[chosen, place * width : (place + 1) * width] = values.to(dtype)
        return found

    @torch.inference_mode()
    def project(self, rows: RoutedRows, values: Tensor) -> Tensor:
        """Phi^T `values` (n, H) of some rows: (E F, H)."""

        def of_expert(expert: int) -> Tensor:
            chosen, found = self._of(rows, expert)
            return product(found, values[chosen], self.work)

        return torch.cat(list(self.each(of_expert, range(self.experts.n_experts))))

    @torch.inference_mode()
    def predict(self, rows: RoutedRows, weights: Tensor) -> Tensor:
        """Phi `weights` (E F, H) of some rows: (n, H), in the type of the weights."""
        found = torch.zeros(len(rows), weights.shape[1], dtype=weights.dtype, device=weights.device)

        def of_expert(expert: int) -> tuple[Tensor, Tensor]:
            chosen, values = self._of(rows, expert)
            return chosen, values.to(weights.dtype) @ weights[self.columns(expert)]

        for chosen, part in self.each(of_expert, range(self.experts.n_experts)):
            found.index_add_(0, chosen, part)  # in order, and no row twice: the same bits each time
        return found

    def on_device(self) -> Iterator[RoutedRows]:
        """All rows, a batch at a time, where they are computed."""
        for rows in self.rows:
            yield rows.to(self.device)

    @torch.inference_mode()
    def right_side(self) -> Tensor:
        """Phi^T of what the routed sums lack: (E F, H)."""
        parts = (self.project(rows, rows.errors) for rows in self.on_device())
        return _total(parts)

    @torch.inference_mode()
    def normal(self, weights: Tensor) -> Tensor:
        """Phi^T Phi `weights` (E F, H)."""
        return _total(self.project(r, self.predict(r, weights)) for r in self.on_device())

    @torch.inference_mode()
    def own_blocks(self) -> Tensor:
        """The diagonal blocks of Phi^T Phi, one per expert: (E, F, F)."""

        def of(rows: RoutedRows) -> Tensor:
            def of_expert(expert: int) -> Tensor:
                _, values = self._of(rows, expert)
                return product(values, values, self.work)

            return torch.stack(list(self.each(of_expert, range(self.experts.n_experts))))

        return _total(of(rows) for rows in self.on_device())

    @torch.inference_mode()
    def squared_error(self, change: Tensor | None) -> float:
        """Sum of squares of what the routed sums still lack with a change of D (E F, H)."""
        total = 0.0
        for rows in self.on_device():
            left = rows.errors.to(self.work)
            if change is not None:
                left = left - self.predict(rows, change)
            total += float(left.double().square().sum())
        return total


def product(left: Tensor, right: Tensor, work: torch.dtype) -> Tensor:
    """`left` (n, a) transposed times `right` (n, b), summed in the type `work`: (a, b)."""
    if not len(left):  # no token of a batch is routed to the expert
        return left.new_zeros(left.shape[1], right.shape[1], dtype=work)
    if left.is_cuda and left.dtype == right.dtype and left.dtype != work:
        return torch.mm(left.t(), right, out_dtype=work)
    return left.to(work).t() @ right.to(work)


def _total(parts: Iterable[Tensor]) -> Tensor:
    total: Tensor | None = None
    for part in parts:
        total = part if total is None else total.add_(part)
    assert total is not None, "a layer without rows"
    return total
