"""The sums and products of a sweep for which torch has no single operation.

Each is a few torch operations, which run anywhere, and on a CUDA device one or two Triton kernels
(`triton_*.py`) that read their input once. Letters as in `experts.py`.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from reap2gguf.errors import DependencyError

_ROW_GROUPS = 128  # parts of a sum over all rows, enough to keep a GPU busy


@cache
def _triton() -> tuple[ModuleType, ModuleType, ModuleType, ModuleType] | None:
    """Triton kernels of a layer, experts, convolutions, saliency; None if it is not installed.

    Raises DependencyError if it is, and does not load.
    """
    if find_spec("triton") is None:
        return None
    try:
        from reap2gguf.observing.compute import (
            triton_convolution,
            triton_experts,
            triton_kernels,
            triton_saliency,
        )
    except ImportError as error:
        raise DependencyError(
            f"Triton is installed and does not load ({error}); install it again, or remove it to "
            "compute without it"
        ) from error
    return triton_kernels, triton_experts, triton_convolution, triton_saliency


def has_triton(device: torch.device) -> bool:
    """Whether the Triton kernels are used for tensors on `device`."""
    return device.type == "cuda" and _triton() is not None


def _kernels_for(values: Tensor) -> ModuleType | None:
    found = _triton() if values.is_cuda else None
    return found and found[0]


def _expert_kernels_for(values: Tensor) -> ModuleType | None:
    found = _triton() if values.is_cuda else None
    return found and found[1]


def _convolution_kernels_for(values: Tensor) -> ModuleType | None:
    found = _triton() if values.is_cuda else None
    return found and found[2]


def _saliency_kernels_for(values: Tensor) -> ModuleType | None:
    found = _triton() if values.is_cuda else None
    return found and found[3]


def gather(
    hidden: Tensor, weights: Tensor, order: Tensor, ends: Tensor, with_squares: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """What the pairs need of their tokens: inputs (S, H), places (N, K), gates (S,), squares.

    hidden: (N, H)    weights: (N, K)    order: (S,), which of the N x K pairs follow one another
    places: int32, where each pair is in the order, or -1    squares: (E, H), if wanted: the sums
    of squares of each expert's inputs
    """
    if kernels := _expert_kernels_for(hidden):
        found: tuple[Tensor, Tensor, Tensor, Tensor | None] = kernels.gather(
            hidden, weights, order, ends, with_squares
        )
        return found
    inputs = hidden[order // weights.shape[-1]]
    return inputs, *placed(weights, order), square_sums(inputs, ends) if with_squares else None


def placed(weights: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """Where each pair is in the order (N, K), int32, or -1, and the weights in that order (S,)."""
    places = torch.full((weights.numel(),), -1, dtype=torch.int32, device=order.device)
    places[order] = torch.arange(len(order), dtype=torch.int32, device=order.device)
    return places.view(weights.shape), weights.reshape(-1)[order]


def can_gate_up(hidden: Tensor, matrices: Tensor) -> bool:
    """Whether `gate_up` computes with these: Hopper's kernel, of bfloat16, in whole blocks."""
    kernels = _expert_kernels_for(hidden)
    if kernels is None or {hidden.dtype, matrices.dtype} != {torch.bfloat16}:
        return False
    is_hopper = torch.cuda.get_device_capability(hidden.device)[0] == 9
    return is_hopper and bool(kernels.fits_gate_up(hidden.shape[-1], matrices.shape[1] // 2))


def gate_up(hidden: Tensor, matrices: Tensor, order: Tensor, ends: Tensor, top_k: int) -> Tensor:
    """silu(gate) * up, (S, F), of hidden (N, H), by matrices (E, 2F, H): gates, then ups.

    order, ends: as for `gather`, whose copies of the tokens it saves
    """
    if kernels := _expert_kernels_for(hidden):
        activations: Tensor = kernels.gate_up(hidden, matrices, order, ends, top_k)
        return activations
    lengths = torch.diff(ends, prepend=ends.new_zeros(1)).tolist()
    parts = torch.split(hidden[order // top_k], lengths)
    products = [part @ matrix.T for part, matrix in zip(parts, matrices, strict=True)]
    return swiglu(torch.cat(products), ends)[0]


def combine(outputs: Tensor, places: Tensor, gates: Tensor, norms: Tensor | None) -> Tensor:
    """The experts' weighted sum (N, H); fills `norms` (2, S), if given: see `norms_of`.

    outputs: (S, H)    places: (N, K) int32, row in `outputs` or -1    gates: (N, K)
    """
    if kernels := _expert_kernels_for(outputs):
        combined: Tensor = kernels.combine(outputs, places, gates, norms)
        return combined
    if norms is not None:
        norms.copy_(norms_of(outputs))
    padded = torch.cat((outputs, outputs.new_zeros(1, outputs.shape[-1])))  # row -1 is nothing
    total = torch.einsum("nkh,nk->nh", padded[places.long()].float(), gates.float())
    return total.to(outputs.dtype)


def norms_of(outputs: Tensor) -> Tensor:
    """The L2 norm and the largest magnitude of each row of outputs (S, H): (2, S) float32."""
    norms = torch.empty(2, len(outputs), dtype=torch.float32, device=outputs.device)
    torch.linalg.vector_norm(outputs, dim=-1, dtype=torch.float32, out=norms[0])
    # torch's own maximum norm takes 20 times as long on a CPU, and the magnitudes take memory
    torch.maximum(outputs.amax(-1), -outputs.amin(-1), out=norms[1])
    return norms


def square_sums(values: Tensor, ends: Tensor) -> Tensor:
    """Sums of squares (G, C), float32, of values (S, C); group g's rows end at ends[g] (int32)."""
    lengths = torch.diff(ends, prepend=ends.new_zeros(1)).tolist()
    return torch.stack([part.float().square().sum(0) for part in torch.split(values, lengths)])


def all_square_sums(values: Tensor) -> Tensor:
    """Sums of squares (1, C), float32 or float64, over every row of values (S, C)."""
    if kernels := _kernels_for(values):
        parts: Tensor = kernels.all_square_sums(values, _ROW_GROUPS)
        return parts.sum(0, keepdim=True, dtype=torch.float64)
    return values.float().square().sum(0, keepdim=True)


def saliency_sums(norms: Tensor, gates: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """Per expert, float64: sums (E, 8) of powers of gates and norms, and the largest norms (E, 2).

    The sums are of gate x norm, gate, norm, gate^2, norm^2, gate^2 x norm, gate x norm^2 and
    gate^2 x norm^2, where a norm is an L2 norm.

    norms: (2, S) float32, as of `norms_of`    gates: (S,)    ends: (E,) int32, where each
    expert's pairs end
    """
    if kernels := _saliency_kernels_for(norms):
        found: tuple[Tensor, Tensor] = kernels.saliency_sums(norms, gates, ends)
        return found
    exact, gate = norms.double(), gates.double()
    norm, product = exact[0], gate * exact[0]
    lengths = torch.diff(ends, prepend=ends.new_zeros(1)).long()
    powers = (gate * gate, norm * norm, gate * product, product * norm, product * product)
    columns = torch.stack((product, gate, norm, *powers), dim=-1)
    sums = torch.segment_reduce(columns, "sum", lengths=lengths, unsafe=True, initial=0)
    peaks = torch.segment_reduce(exact.T, "max", lengths=lengths, unsafe=True, initial=0)
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


def add_rms_norm(
    values: Tensor, added: Tensor, weight: Tensor, eps: float, offset: float
) -> tuple[Tensor, Tensor]:
    """values + added, and the RMSNorm of the sum."""
    if kernels := _kernels_for(values):
        fused: tuple[Tensor, Tensor] = kernels.add_rms_norm(values, added, weight, eps, offset)
        return fused
    total = added + values
    return total, rms_norm(total, weight, eps, offset)


def norm_rotary(
    values: Tensor, weight: Tensor, eps: float, offset: float, cos: Tensor, sin: Tensor
) -> Tensor:
    """RMSNorm of each head, and the rotary embedding (arXiv 2104.09864) of its first values.

    values: (B, T, heads, D)    cos, sin: (1 or B, T, R), R <= D; value r turns with r + R / 2
    """
    if kernels := _kernels_for(values):
        fused: Tensor = kernels.norm_rotary(values, weight, eps, offset, cos, sin)
        return fused
    normed = rms_norm(values, weight, eps, offset)
    turning, rest = normed[..., : cos.shape[-1]], normed[..., cos.shape[-1] :]
    first, second = turning.chunk(2, dim=-1)
    turned = turning * cos[:, :, None] + torch.cat((-second, first), -1) * sin[:, :, None]
    return torch.cat((turned, rest), dim=-1)


def causal_convolution(values: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    """Each channel of values (B, T, C) convolved over the tokens up to its own, then SiLU if asked.

    weight: (C, taps), the last tap for the token itself    bias: (C,)
    """
    if kernels := _convolution_kernels_for(values):
        convolved: Tensor = kernels.causal_convolution(values, weight, bias, silu)
        return convolved
    taps = weight.shape[-1]
    padded = torch.nn.functional.pad(values.float(), (0, 0, taps - 1, 0))
    total = (padded.unfold(1, taps, 1) * weight.float()).sum(-1)
    if bias is not None:
        total = total + bias.float()
    return (torch.nn.functional.silu(total) if silu else total).to(values.dtype)


def route(logits: Tensor, top_k: int, renormalized: bool) -> tuple[Tensor, Tensor]:
    """Of softmax(logits) of (N, E) the K largest, in descending order, and their experts: (N, K).

    renormalized: the K are divided by their sum
    """
    if kernels := _kernels_for(logits):
        found: tuple[Tensor, Tensor] = kernels.route(logits, top_k, renormalized)
        return found
    weights, ids = torch.softmax(logits, dim=-1, dtype=torch.float32).topk(top_k, dim=-1)
    if renormalized:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights.to(logits.dtype), ids


def sigmoid_gated(values: Tensor, gates: Tensor) -> Tensor:
    """values x sigmoid(gates), both (B, T, heads, D)."""
    if kernels := _kernels_for(values):
        gated: Tensor = kernels.sigmoid_gated(values, gates)
        return gated
    return values * torch.sigmoid(gates)


def finite_rows(values: Tensor) -> Tensor:
    """Which rows of (..., C) have finite values only: bool (...)."""
    if kernels := _kernels_for(values):
        flags: Tensor = kernels.finite_rows(values)
        return flags
    return torch.isfinite(values).all(-1)


def copy_if(wanted: Tensor, values: Tensor, target: Tensor) -> None:
    """Copy `values` into `target` if the flag `wanted` is true; the host does not wait for it."""
    if kernels := _kernels_for(values):
        kernels.copy_if(wanted, values, target)
    else:
        torch.where(wanted, values, target, out=target)


def attention(query: Tensor, key: Tensor, value: Tensor, scale: float, by_cudnn: bool) -> Tensor:
    """Causal attention over (B, T, heads, D), where queries may share key heads.

    by_cudnn: cuDNN's kernel, which is faster on Hopper and takes a while for a new shape
    """
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION) if by_cudnn else nullcontext():
        output = scaled_dot_product_attention(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            is_causal=query.shape[1] > 1,
            scale=scale,
            enable_gqa=query.shape[2] != key.shape[2],
        )
    return output.transpose(1, 2)


@cache
def has_cudnn_attention(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Whether cuDNN computes attention with heads of `width`, and is the faster one."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] < 9:
        return False
    if dtype not in (torch.bfloat16, torch.float16):
        return False
    generator = torch.Generator(device).manual_seed(0)
    heads = torch.randn(3, 1, 128, 2, width, dtype=dtype, device=device, generator=generator)
    query, key, value = heads[0], heads[1, :, :, :1], heads[2, :, :, :1]
    expected = attention(query, key, value, width**-0.5, by_cudnn=False).float()
    try:
        found = attention(query, key, value, width**-0.5, by_cudnn=True).float()
    except RuntimeError:
        return False  # not of heads this wide, or not this version
    return float((found - expected).norm() / expected.norm()) < 0.01


def swiglu(
    gate_up: Tensor, ends: Tensor, with_squares: bool = False
) -> tuple[Tensor, Tensor | None]:
    """silu(gate) * up, (S, F), from (S, 2F): the gates, then the ups; sums of squares (E, F)."""
    if kernels := _expert_kernels_for(gate_up):
        found: tuple[Tensor, Tensor | None] = kernels.swiglu(gate_up, ends, with_squares)
        return found
    gate, up = gate_up.chunk(2, dim=-1)
    activations = torch.nn.functional.silu(gate) * up
    return activations, square_sums(activations, ends) if with_squares else None
