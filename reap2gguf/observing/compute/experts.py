"""One experts function for every architecture, which computes routed pairs only and shows them.

transformers dispatches each Mixture-of-Experts layer through `ALL_EXPERTS_FUNCTIONS`; the function
here is registered there. It receives the indices and gate weights that the model's own router
returned, so whatever the routing is (softmax, sigmoid, bias, groups), saliency uses the weights
that the model applies.

A GPU computes all experts in two grouped matrix products and never waits for the host. A thread of
a CPU takes one expert after another, so that the pairs of one expert are all that it holds, and the
weights may stay in the type they are stored in.

Letters: N tokens, K experts per token, S routed pairs, E experts, H hidden, F expert width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm, linear

from reap2gguf.errors import UnsupportedModelError
from reap2gguf.observing.compute import kernels
from reap2gguf.observing.compute.crew import Crew, current_piece
from reap2gguf.observing.compute.fused import is_swiglu

IMPLEMENTATION = "reap2gguf"
_OBSERVER = "reap2gguf_observer"
Each = Callable[
    [Callable[[int], tuple[Tensor, Tensor]], Iterable[int]], Iterable[tuple[Tensor, Tensor]]
]


@dataclass(frozen=True)
class RealTokens:
    """Which of a batch's N positions are tokens and not padding."""

    mask: Tensor  # (N,) bool
    places: Tensor  # the true ones' positions, int64

    @property
    def count(self) -> int:
        return len(self.places)


@dataclass(frozen=True)
class RoutedPairs:
    """What some experts of a layer did with a batch, sorted by expert; padding is left out."""

    first_expert: int  # the pairs are of this expert and those after it, as many as `ends` has
    inputs: Tensor  # (S, H), what gate and up multiplied
    activations: Tensor  # (S, F), what down multiplied
    norms: Tensor | None  # (S,) float32, L2 norms of the outputs before weighting, if asked for
    gates: Tensor  # (S,), the weights applied
    ends: Tensor  # int32, where each expert's pairs end

    @property
    def counts(self) -> Tensor:
        """Pairs per expert, int64."""
        return torch.diff(self.ends, prepend=self.ends.new_zeros(1)).long()


class ExpertsObserver(Protocol):
    """Looks at routed pairs."""

    wants_norms: bool
    real_tokens: RealTokens | None  # None where no token is padding

    def see(self, pairs: RoutedPairs) -> None:
        """Some experts' pairs of one batch; together the calls show every expert once."""


def register() -> None:
    """Make the function known to transformers; safe to repeat."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    if IMPLEMENTATION not in ALL_EXPERTS_FUNCTIONS:
        ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, observed_experts_forward)


def watch(experts: torch.nn.Module, observer: ExpertsObserver) -> None:
    """Let `observer` see everything that passes through an experts module."""
    if not getattr(experts, "has_gate", False) or getattr(experts, "has_bias", True):
        raise UnsupportedModelError(
            f"{type(experts).__name__}: experts with biases or without a gate are not implemented"
        )
    setattr(experts, _OBSERVER, observer)


def observed_experts_forward(
    self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The experts' weighted sum (N, H).

    hidden_states: (N, H)    top_k_index, top_k_weights: (N, K)
    """
    piece = current_piece()
    if piece is None:
        return _run(self, hidden_states, top_k_index, top_k_weights, map)
    combined: Tensor = piece.meet(
        (hidden_states, top_k_index, top_k_weights), partial(_joint, self)
    )
    return combined


def _joint(self: Any, crew: Crew, brought: list[tuple[Tensor, ...]]) -> list[Tensor]:
    """The experts over the rows of all pieces of a batch, and each piece's share."""
    hidden, index, weights = (torch.cat(parts) for parts in zip(*brought, strict=True))
    lengths = [len(parts[0]) for parts in brought]
    return list(torch.split(_run(self, hidden, index, weights, crew.in_order), lengths))


def _run(self: Any, hidden: Tensor, top_k_index: Tensor, weights: Tensor, each: Each) -> Tensor:
    observer: ExpertsObserver | None = getattr(self, _OBSERVER, None)
    real = observer.real_tokens if observer is not None else None
    expert_ids, n_pairs = top_k_index.to(torch.int32), top_k_index.numel()
    if real is not None:
        # padding goes to an expert that does not exist: sorted last, then cut off
        expert_ids = torch.where(real.mask[:, None], expert_ids, self.num_experts)
        n_pairs = real.count * top_k_index.shape[-1]
    ids, order = torch.sort(expert_ids.reshape(-1), stable=True)
    experts = torch.arange(self.num_experts, dtype=torch.int32, device=ids.device)
    ends = torch.searchsorted(ids, experts, right=True, out_int32=True)
    run = _all_at_once if hidden.is_cuda else _one_by_one
    return run(self, hidden, weights, order[:n_pairs], ends, observer, each)


def _all_at_once(
    self: Any, hidden: Tensor, weights: Tensor, order: Tensor, ends: Tensor,
    observer: ExpertsObserver | None, each: Each,
) -> Tensor:  # fmt: skip
    """Two grouped matrix products over all pairs; the host never asks how many an expert has.

    Nothing is left for `each` to share out.
    """
    n_pairs, top_k = len(order), weights.shape[-1]
    inputs = hidden[order // top_k]  # (S, H)
    gate_up = grouped_mm(inputs, self.gate_up_proj.transpose(-2, -1), offs=ends)  # (S, 2F)
    activations = kernels.swiglu(gate_up) if is_swiglu(self) else self._apply_gate(gate_up)
    del gate_up
    outputs = grouped_mm(activations, self.down_proj.transpose(-2, -1), offs=ends)  # (S, H)
    places = order.new_full((weights.numel(),), -1, dtype=torch.int32)
    places[order] = torch.arange(n_pairs, dtype=torch.int32, device=order.device)
    norms = None
    if observer is not None and observer.wants_norms:
        norms = torch.empty(n_pairs, dtype=torch.float32, device=order.device)
    combined = kernels.combine(outputs, places.view(-1, top_k), weights, norms)
    if observer is not None:
        gates = weights.reshape(-1)[order]
        observer.see(RoutedPairs(0, inputs, activations, norms, gates, ends))
    return combined


def _one_by_one(
    self: Any, hidden: Tensor, weights: Tensor, order: Tensor, ends: Tensor,
    observer: ExpertsObserver | None, each: Each,
) -> Tensor:  # fmt: skip
    """Expert after expert, by `each`; a thread widens one's weights at a time."""
    combined = torch.zeros_like(hidden)
    limits = [0, *ends.tolist()]
    top_k = weights.shape[-1]

    def run(expert: int) -> tuple[Tensor, Tensor]:
        chosen = order[limits[expert] : limits[expert + 1]]
        tokens, gates = chosen // top_k, weights.reshape(-1)[chosen]
        inputs = hidden[tokens]
        activations = self._apply_gate(linear(inputs, self.gate_up_proj[expert].to(hidden.dtype)))
        outputs = linear(activations, self.down_proj[expert].to(hidden.dtype))
        if observer is not None:
            norms = None
            if observer.wants_norms:
                norms = torch.linalg.vector_norm(outputs, dim=-1, dtype=torch.float32)
            there = torch.tensor([len(chosen)], dtype=torch.int32)
            observer.see(RoutedPairs(expert, inputs, activations, norms, gates, there))
        return tokens, (outputs * gates[:, None]).to(combined.dtype)

    for tokens, weighted in each(run, range(len(limits) - 1)):
        # a token is routed to an expert once, so no row is named twice; one expert after another,
        # since the order of additions shows
        combined.index_add_(0, tokens, weighted)
    return combined
