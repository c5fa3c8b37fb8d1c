"""One function for the experts of every architecture, which shows each routed pair to an observer.

A routed pair is a token and one of the experts that the router chose for it. transformers calls the
experts of each layer through `ALL_EXPERTS_FUNCTIONS`; the function here is registered there. It
receives the indices and gate weights that the model's own router returned, so for any routing
(softmax, sigmoid, bias, groups) saliency uses the weights that the model applies.

A GPU computes all experts in two grouped matrix products, and the host does not wait for it. A
thread of a CPU computes one expert at a time, so that it holds the pairs of one expert only, and
the weights may keep the type they are stored in.

Letters: N tokens, K experts per token, S routed pairs, E experts, H hidden, F expert width.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm, linear

from reap2gguf.errors import UnsupportedModelError
from reap2gguf.observing.compute import fused, kernels
from reap2gguf.observing.compute.crew import Crew, current_slice
from reap2gguf.observing.compute.gating import activated, first_name

IMPLEMENTATION = "reap2gguf"
_OBSERVER = "reap2gguf_observer"
_BIASED_ROWS = 2**13  # that biases are added to at once: each takes a row of memory more
# `map`, or a map that runs in several threads
Map = Callable[
    [Callable[[int], tuple[Tensor, Tensor]], Iterable[int]], Iterable[tuple[Tensor, Tensor]]
]


@dataclass(frozen=True)
class RealTokens:
    """Which of a batch's N positions are tokens and not padding."""

    mask: Tensor  # (N,) bool
    positions: Tensor  # int64, where the mask is true

    @property
    def count(self) -> int:
        return len(self.positions)


@dataclass(frozen=True)
class RoutedPairs:
    """What some experts of a layer computed in a batch, sorted by expert, without padding."""

    first_expert: int  # the pairs are of this expert and the next ones, as many as `ends` has
    inputs: Tensor | None  # (S, H), of the gate and up matrices, unless their squares are there
    activations: Tensor  # (S, F), inputs of the down matrix
    # (2, S) float32, if wanted: L2 norms of the outputs before weighting, and largest magnitudes
    norms: Tensor | None
    gates: Tensor  # (S,), the weights applied
    ends: Tensor  # int32, where each expert's pairs end
    # sums of squares per expert, (E, H) and (E, F), if they are wanted and were computed already
    input_squares: Tensor | None = None
    activation_squares: Tensor | None = None

    @property
    def counts(self) -> Tensor:
        """Pairs per expert, int64."""
        return torch.diff(self.ends, prepend=self.ends.new_zeros(1)).long()


class ExpertsObserver(Protocol):
    """Receives the routed pairs."""

    wants_norms: bool
    wants_squares: bool
    real_tokens: RealTokens | None  # None if no position is padding

    def see(self, pairs: RoutedPairs) -> None:
        """Take in the pairs of some experts in one batch; the calls show every expert once."""


def register() -> None:
    """Register the function with transformers; it may be called again."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    if IMPLEMENTATION not in ALL_EXPERTS_FUNCTIONS:
        ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, observed_experts_forward)


def watch(experts: torch.nn.Module, observer: ExpertsObserver) -> None:
    """Show `observer` the routed pairs of an experts module.

    Raises UnsupportedModelError for a module that does not say whether its experts have a gate.
    """
    if not hasattr(experts, "has_gate"):
        raise UnsupportedModelError(
            f"{type(experts).__name__}: experts of this kind are not supported"
        )
    setattr(experts, _OBSERVER, observer)


def observed_experts_forward(
    self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The experts' weighted sum (N, H).

    hidden_states: (N, H)    top_k_index, top_k_weights: (N, K)
    """
    part = current_slice()
    if part is None:
        return _run(self, hidden_states, top_k_index, top_k_weights, map)
    combined: Tensor = part.meet((hidden_states, top_k_index, top_k_weights), partial(_joint, self))
    return combined


def _joint(self: Any, crew: Crew, slices: list[tuple[Tensor, ...]]) -> list[Tensor]:
    """The experts on the rows of all slices of a batch, and each slice's share of the result."""
    hidden, index, weights = (torch.cat(parts) for parts in zip(*slices, strict=True))
    lengths = [len(parts[0]) for parts in slices]
    return list(torch.split(_run(self, hidden, index, weights, crew.in_order), lengths))


def _run(self: Any, hidden: Tensor, top_k_index: Tensor, weights: Tensor, each: Map) -> Tensor:
    observer: ExpertsObserver | None = getattr(self, _OBSERVER, None)
    real = observer.real_tokens if observer is not None else None
    expert_ids, n_pairs = top_k_index.to(torch.int32), top_k_index.numel()
    if real is not None:
        # padding goes to an expert that does not exist: it is sorted last and cut off
        expert_ids = torch.where(real.mask[:, None], expert_ids, self.num_experts)
        n_pairs = real.count * top_k_index.shape[-1]
    if hidden.is_cuda:  # a GPU sorts short numbers more quickly
        expert_ids = expert_ids.to(torch.uint8 if self.num_experts < 256 else torch.int16)
    ids, order = torch.sort(expert_ids.reshape(-1), stable=True)
    experts = torch.arange(self.num_experts, dtype=ids.dtype, device=ids.device)
    ends = torch.searchsorted(ids, experts, right=True, out_int32=True)
    run = _all_at_once if hidden.is_cuda else _one_by_one
    return run(self, hidden, weights, order[:n_pairs], ends, observer, each)


def _all_at_once(
    self: Any,
    hidden: Tensor,
    weights: Tensor,
    order: Tensor,
    ends: Tensor,
    observer: ExpertsObserver | None,
    each: Map,
) -> Tensor:
    """Two matrix products over all pairs; the host does not learn how many each expert has.

    `each` is not used.
    """
    with_squares = observer is not None and observer.wants_squares
    inputs: Tensor | None = None
    input_squares, activation_squares = None, None
    # sums of squares come with copies of the tokens, which are then the quicker way
    is_swiglu = self.has_gate and fused.is_swiglu(self)
    if is_swiglu and not with_squares and kernels.can_gate_up(hidden, self.gate_up_proj):
        places, gates = kernels.placed(weights, order)
        top_k = weights.shape[-1]
        activations = kernels.gate_up(hidden, self.gate_up_proj, order, ends, top_k)
    else:
        inputs, places, gates, input_squares = kernels.gather(
            hidden, weights, order, ends, with_squares
        )
        products = _grouped(self, first_name(self), inputs, ends)  # (S, 2F)
        if is_swiglu:
            activations, activation_squares = kernels.swiglu(products, ends, with_squares)
        else:
            activations = activated(self, products)
        del products
    outputs = _grouped(self, "down_proj", activations, ends)  # (S, H)
    norms = None
    if observer is not None and observer.wants_norms:
        norms = torch.empty(2, len(order), dtype=torch.float32, device=order.device)
    combined = kernels.combine(outputs, places, weights, norms)
    if observer is not None:
        squares = input_squares, activation_squares
        observer.see(RoutedPairs(0, inputs, activations, norms, gates, ends, *squares))
    return combined


def _grouped(self: Any, name: str, values: Tensor, ends: Tensor) -> Tensor:
    """Each pair's row of values (S, C) through the matrix of its expert, and the bias if any."""
    weight = getattr(self, name)
    found = grouped_mm(values, weight if _is_transposed(self) else weight.mT, offs=ends)
    if not _has_bias(self):
        return found
    biases = getattr(self, f"{name}_bias")
    numbers = torch.arange(len(found), dtype=ends.dtype, device=ends.device)
    experts = torch.searchsorted(ends, numbers, right=True)
    parts = torch.split(found, _BIASED_ROWS), torch.split(experts, _BIASED_ROWS)
    for some, own in zip(*parts, strict=True):
        some += biases[own]
    return found


def _is_transposed(self: Any) -> bool:
    """Whether matrices are (E, in, out), as gpt-oss has them, and not (E, out, in)."""
    return bool(getattr(self, "is_transposed", False))


def _has_bias(self: Any) -> bool:
    return bool(getattr(self, "has_bias", False))


def _one_by_one(
    self: Any,
    hidden: Tensor,
    weights: Tensor,
    order: Tensor,
    ends: Tensor,
    observer: ExpertsObserver | None,
    each: Map,
) -> Tensor:
    """One expert after another, by `each`; a thread converts the weights of one at a time."""
    combined = torch.zeros_like(hidden)
    widened = _Widened(hidden.dtype)
    limits = [0, *ends.tolist()]
    top_k = weights.shape[-1]

    def product(name: str, expert: int, values: Tensor) -> Tensor:
        weight = widened(getattr(self, name)[expert])
        bias = getattr(self, f"{name}_bias")[expert].to(values.dtype) if _has_bias(self) else None
        return linear(values, weight.T if _is_transposed(self) else weight, bias)

    def run(expert: int) -> tuple[Tensor, Tensor]:
        chosen = order[limits[expert] : limits[expert + 1]]
        tokens, gates = chosen // top_k, weights.reshape(-1)[chosen]
        inputs = hidden[tokens]
        activations = activated(self, product(first_name(self), expert, inputs))
        outputs = product("down_proj", expert, activations)
        if observer is not None:
            norms = kernels.norms_of(outputs) if observer.wants_norms else None
            end = torch.tensor([len(chosen)], dtype=torch.int32)
            observer.see(RoutedPairs(expert, inputs, activations, norms, gates, end))
        return tokens, (outputs * gates[:, None]).to(combined.dtype)

    for tokens, weighted in each(run, range(len(limits) - 1)):
        # no token is routed to an expert twice, so no row occurs twice; the experts are added in
        # order, because the order of additions changes the last bits
        combined.index_add_(0, tokens, weighted)
    return combined


class _Widened(threading.local):
    """Weights in the computing type, in memory that each thread uses again for every expert.

    New memory for each would have to be cleared by the system first, which takes longer than the
    conversion, and would leave holes of its size among what the other threads allocate.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._held: dict[torch.Size, Tensor] = {}

    def __call__(self, weight: Tensor) -> Tensor:
        """`weight` itself if it has the type; else a copy, until the next one of its shape."""
        if weight.dtype == self._dtype:
            return weight
        if weight.shape not in self._held:
            self._held[weight.shape] = torch.empty_like(weight, dtype=self._dtype)
        return self._held[weight.shape].copy_(weight)
