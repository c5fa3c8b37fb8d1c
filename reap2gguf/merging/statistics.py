"""What a layer's merge is decided by: sums over tokens of what all of its experts would give.

Every expert computes every token, not only those that are routed to it, a few thousand tokens at a
time. Sums are float64 and added in the order of tokens, so they do not depend on the threads.

Letters: n tokens, E experts, K experts per token, H hidden, F expert width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor
from torch.nn.functional import linear

from reap2gguf.merging.room import COSINE_BYTES, LEAST_COMPARED, PIECE, token_bytes

if TYPE_CHECKING:
    from reap2gguf.repairing.features import Map, ModuleExperts

_MOST_COMPARED = 1024  # tokens
_EPS = 1e-8


@dataclass(frozen=True)
class Entering:
    """What enters the experts of a layer: tokens without padding, and where they are routed."""

    routed: Tensor  # (n, H), what enters the router
    inputs: Tensor  # (n, H), or (n, L) where the block makes a latent for its experts
    index: Tensor  # (n, K), experts

    def piece(self, first: int, count: int) -> Entering:
        """`count` tokens from the `first` one."""
        part = slice(first, first + count)
        return Entering(self.routed[part], self.inputs[part], self.index[part])


class Sums(Protocol):
    """Sums of one layer."""

    def add(self, entering: Entering, experts: ModuleExperts, each: Map) -> None:
        """Take in some tokens."""


@dataclass
class ReamSums:
    """What REAM compares experts by."""

    router: Tensor  # (E, H) float32
    logits_gram: Tensor  # (E, E) float64: products of the router's logits, over tokens
    activations: Tensor  # (E, F) float64: what the router's softmax gives, times activations
    n_tokens: int = 0

    @classmethod
    def zeros(cls, router: Tensor, width: int) -> ReamSums:
        count, double = len(router), torch.float64
        return cls(
            router,
            torch.zeros(count, count, dtype=double, device=router.device),
            torch.zeros(count, width, dtype=double, device=router.device),
        )

    def add(self, entering: Entering, experts: ModuleExperts, each: Map) -> None:
        for first in range(0, len(entering.inputs), PIECE):
            inputs = entering.inputs[first : first + PIECE]
            logits = linear(entering.routed[first : first + PIECE].float(), self.router)
            self.logits_gram += logits.double().T @ logits.double()
            gates = torch.softmax(logits, dim=-1).double()  # (n, E)
            for expert, found in enumerate(
                each(_Gated(experts, inputs, gates), range(experts.n_experts))
            ):
                self.activations[expert] += found
        self.n_tokens += len(entering.inputs)

    def outputs(self, down: Tensor) -> Tensor:
        """Means of the gated outputs, (E, H) float64, given `down` (E, H, F).

        An output is linear in the activations, so their sums are enough.
        """
        means = self.activations / max(self.n_tokens, 1)
        return torch.stack(
            [matrix.double() @ mean for matrix, mean in zip(down, means, strict=True)]
        )


@dataclass(frozen=True)
class _Gated:
    """The sum of an expert's gated activations over some tokens, (F,)."""

    experts: ModuleExperts
    inputs: Tensor
    gates: Tensor

    def __call__(self, expert: int) -> Tensor:
        activations = self.experts.activations(expert, self.inputs)
        return self.gates[:, expert] @ activations.double()


@dataclass
class TtmSums:
    """Token by token: how far the outputs of all experts are from those of the routed ones."""

    distances: Tensor  # (E, E) float64: sums of 1 - cosine, over the tokens of the row's expert
    n_tokens: int = 0

    @classmethod
    def zeros(cls, n_experts: int, device: torch.device) -> TtmSums:
        return cls(torch.zeros(n_experts, n_experts, dtype=torch.float64, device=device))

    def add(self, entering: Entering, experts: ModuleExperts, each: Map) -> None:
        count, hidden = experts.n_experts, entering.inputs.shape[1]
        step = min(_MOST_COMPARED, COSINE_BYTES // token_bytes(count, hidden))
        step = max(LEAST_COMPARED, step)
        for first in range(0, len(entering.inputs), step):
            part = entering.piece(first, step)
            outputs = torch.stack(list(each(_Unit(experts, part.inputs), range(count))))
            cosines = torch.bmm(outputs.transpose(0, 1), outputs.permute(1, 2, 0))  # (n, E, E)
            routed = torch.zeros(len(part.inputs), count, dtype=torch.float64)
            routed = routed.to(cosines.device).scatter_(1, part.index.long(), 1.0)
            self.distances += torch.einsum("te,tef->ef", routed, 1 - cosines.double())
        self.n_tokens += len(entering.inputs)


@dataclass(frozen=True)
class _Unit:
    """An expert's outputs of some tokens, each of length 1: (n, H) float32."""

    experts: ModuleExperts
    inputs: Tensor

    def __call__(self, expert: int) -> Tensor:
        activations = self.experts.activations(expert, self.inputs)
        down = self.experts.module.down_proj[expert].to(activations.dtype)
        outputs: Tensor = linear(activations, down).float()
        outputs /= outputs.norm(dim=1, keepdim=True).clamp_min(_EPS)
        return outputs
