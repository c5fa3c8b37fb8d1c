"""The sums and products of a sweep that torch has no single operation for.

Each is a few torch operations, which run anywhere, and on a CUDA device one Triton kernel
(`triton_kernels.py`) that reads its input once. Letters as in `experts.py`.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType

import torch
from torch import Tensor

_ROW_GROUPS = 128  # a sum over all rows is cut into so many, to fill a GPU


@cache
def _triton() -> ModuleType | None:
    """The Triton kernels; None where Triton is not installed."""
    try:
        from reap2gguf.observing.compute import triton_kernels
    except ImportError:
        return None
    return triton_kernels


def has_triton(device: torch.device) -> bool:
    """Whether the Triton kernels are used for tensors on `device`."""
    return device.type == "cuda" and _triton() is not None


def _kernels_for(values: Tensor) -> ModuleType | None:
    return _triton() if values.is_cuda else None


def combine(outputs: Tensor, places: Tensor, gates: Tensor, norms: Tensor | None) -> Tensor:
    """The experts' weighted sum (N, H); fills `norms` (S,), the L2 norms of `outputs`, if given.

    outputs: (S, H)    places: (N, K) int32, row in `outputs` or -1    gates: (N, K)
    """
    if kernels := _kernels_for(outputs):
        combined: Tensor = kernels.combine(outputs, places, gates, norms)
        return combined
    if norms is not None:
        torch.linalg.vector_norm(outputs, dim=-1, dtype=torch.float32, out=norms)
    padded = torch.cat((outputs, outputs.new_zeros(1, outputs.shape[-1])))  # row -1 is nothing
    total = torch.einsum("nkh,nk->nh", padded[places.long()].float(), gates.float())
    return total.to(outputs.dtype)


def square_sums(values: Tensor, ends: Tensor) -> Tensor:
    """Sums of squares (G, C), float32, of values (S, C); group g's rows end at ends[g] (int32)."""
    if kernels := _kernels_for(values):
        sums: Tensor = kernels.square_sums(values, ends)
        return sums
    lengths = torch.diff(ends, prepend=ends.new_zeros(1)).tolist()
    return torch.stack([part.float().square().sum(0) for part in torch.split(values, lengths)])


def all_square_sums(values: Tensor) -> Tensor:
    """Sums of squares (1, C), float32, over every row of values (S, C)."""
    if not values.is_cuda:
        return values.float().square().sum(0, keepdim=True)
    n_rows = len(values)
    ends = torch.arange(1, _ROW_GROUPS + 1, device=values.device) * n_rows // _ROW_GROUPS
    return square_sums(values.contiguous(), ends.to(torch.int32)).sum(0, keepdim=True)


def saliency_sums(norms: Tensor, gates: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """Per expert, float64: sums (E, 3) of gate x norm, gate and norm, and the largest norm (E,).

    norms: (S,) float32    gates: (S,)    ends: (E,) int32, where each expert's pairs end
    """
    if kernels := _kernels_for(norms):
        found: tuple[Tensor, Tensor] = kernels.saliency_sums(norms, gates, ends)
        return found
    exact, weights = norms.double(), gates.double()
    lengths = torch.diff(ends, prepend=ends.new_zeros(1)).long()
    columns = torch.stack((weights * exact, weights, exact), dim=-1)
    sums = torch.segment_reduce(columns, "sum", lengths=lengths, unsafe=True, initial=0)
    peaks = torch.segment_reduce(exact, "max", lengths=lengths, unsafe=True, initial=0)
    return sums, peaks


def rms_norm(
    values: Tensor, weight: Tensor, eps: float, offset: float, gate: Tensor | None = None
) -> Tensor:
    """RMSNorm (arXiv 1910.07467) over the last axis, times (offset + weight), times silu(gate)."""
    if kernels := _kernels_for(values):
        fused: Tensor = kernels.rms_norm(values, weight, eps, offset, gate)
        return fused
    exact = values.float()
    normed = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + eps)
    normed = normed * (weight.float() + offset)
    if gate is not None:
        normed = normed * torch.nn.functional.silu(gate.float())
    return normed.to(values.dtype)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, (S, F), from (S, 2F): the gates, then the ups."""
    if kernels := _kernels_for(gate_up):
        activations: Tensor = kernels.swiglu(gate_up)
        return activations
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up
