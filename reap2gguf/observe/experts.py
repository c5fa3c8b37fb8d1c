"""One experts function for every architecture, which computes routed pairs only and shows them.

transformers dispatches each Mixture-of-Experts layer through `ALL_EXPERTS_FUNCTIONS`; the function
here is registered there. It receives the indices and gate weights that the model's own router
returned, so whatever the routing is (softmax, sigmoid, bias, groups), saliency uses the weights
that the model applies.

Letters: N tokens, K experts per token, S routed pairs, E experts, H hidden, F expert width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm

from reap2gguf.errors import UnsupportedModelError

IMPLEMENTATION = "reap2gguf"
_OBSERVER = "reap2gguf_observer"


@dataclass(frozen=True)
class RoutedPairs:
    """What the experts of a layer did with a batch, sorted by expert; padding is left out."""

    inputs: Tensor  # (S, H), what gate and up multiplied
    activations: Tensor  # (S, F), what down multiplied
    outputs: Tensor  # (S, H), before weighting
    gates: Tensor  # (S,), the weights applied
    counts: Tensor  # (E,), pairs per expert, int64


class ExpertsObserver(Protocol):
    """Looks at routed pairs."""

    real_tokens: Tensor | None  # (N,) bool, None where no token is padding

    def see(self, pairs: RoutedPairs) -> None:
        """One batch of one layer passed through the experts."""


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
    """The experts' weighted sum (N, H), computed by two grouped matrix products.

    hidden_states: (N, H)    top_k_index, top_k_weights: (N, K)
    """
    observer: ExpertsObserver | None = getattr(self, _OBSERVER, None)
    real = observer.real_tokens if observer is not None else None
    n_tokens, top_k = top_k_index.shape
    expert_ids = top_k_index.reshape(-1)
    n_pairs = expert_ids.numel()
    if real is not None:
        # padding goes to an expert that does not exist: sorted last, then cut off
        expert_ids = torch.where(real.repeat_interleave(top_k), expert_ids, self.num_experts)
        n_pairs = int(real.sum()) * top_k
    order = torch.sort(expert_ids, stable=True).indices[:n_pairs]
    counts = torch.zeros(self.num_experts + 1, dtype=torch.int64, device=expert_ids.device)
    counts = counts.index_add_(0, expert_ids, torch.ones_like(expert_ids))[: self.num_experts]
    ends = counts.cumsum(0).to(torch.int32)

    inputs = hidden_states[order // top_k]  # (S, H)
    gates = top_k_weights.reshape(-1)[order]  # (S,)
    gate_up = grouped_mm(inputs, self.gate_up_proj.transpose(-2, -1), offs=ends)  # (S, 2F)
    activations = self._apply_gate(gate_up)  # (S, F)
    outputs = grouped_mm(activations, self.down_proj.transpose(-2, -1), offs=ends)  # (S, H)
    if observer is not None:
        observer.see(RoutedPairs(inputs, activations, outputs, gates, counts))

    weighted = outputs.new_zeros(n_tokens * top_k, outputs.shape[-1])
    weighted[order] = outputs * gates.unsqueeze(-1)
    return weighted.view(n_tokens, top_k, -1).sum(1).to(hidden_states.dtype)


def sum_by_expert(values: Tensor, counts: Tensor) -> Tensor:
    """Sums (E, ...) of rows (S, ...) sorted by expert; deterministic."""
    if values.device.type == "cpu":  # segment_reduce runs on one core there
        return torch.stack([part.sum(0) for part in torch.split(values, counts.tolist())])
    return torch.segment_reduce(values, "sum", lengths=counts, axis=0, unsafe=True)
