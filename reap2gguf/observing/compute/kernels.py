"""The sums and products of a sweep for which torch has no single operation.

Each is a few torch operations, which run anywhere, and on a CUDA device one Triton kernel
(`triton_kernels.py`) that reads its input once. Letters as in `experts.py`.

RMSNorm and SwiGLU replace code of transformers, which launches many kernels for each. Modules are
recognized by what they compute: one module of each class is tried on random values, and a kernel
is used only if it gives the same result. Any other norm keeps its own code.
"""

from __future__ import annotations

from functools import cache, partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

_ROW_GROUPS = 128  # parts of a sum over all rows, enough to keep a GPU busy
_PROBE_WIDTH = 64  # of the random values on which a norm is tried


@cache
def _triton() -> ModuleType | None:
    """The Triton kernels; None if Triton is not installed."""
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


def fuse_norms(module: torch.nn.Module) -> int:
    """Let every RMSNorm in `module` compute by one kernel; the number of them."""
    found = 0
    for part in module.modules():
        recipe = _norm_recipe(type(part))  # type: ignore[arg-type]
        eps = getattr(part, "variance_epsilon", getattr(part, "eps", None))
        if recipe is None or not isinstance(eps, float):
            continue
        offset, _ = recipe
        part.forward = partial(_norm, part, eps, offset)
        found += 1
    return found


def _norm(
    module: Any, eps: float, offset: float, hidden_states: Tensor, gate: Tensor | None = None
) -> Tensor:
    return rms_norm(hidden_states, module.weight, eps, offset, gate)


@cache  # one module of each class is tried
def _norm_recipe(kind: type[torch.nn.Module]) -> tuple[float, bool] | None:
    """What an RMSNorm adds to its weight, and whether it takes a gate; None for other modules."""
    if not kind.__name__.replace("Gated", "").endswith("RMSNorm"):
        return None
    gated = "Gated" in kind.__name__
    generator = torch.Generator().manual_seed(0)
    values, weight, gate = torch.randn(3, 5, _PROBE_WIDTH, generator=generator)
    try:
        norm: Any = kind(_PROBE_WIDTH, eps=1e-3)
        norm.weight = torch.nn.Parameter(weight[0], requires_grad=False)
        with torch.inference_mode():
            expected = norm(values, gate) if gated else norm(values)
    except (TypeError, RuntimeError, AttributeError):
        return None  # its arguments are not those of a known norm
    for offset in (0.0, 1.0):
        ours = rms_norm(values, weight[0], 1e-3, offset, gate if gated else None)
        if torch.allclose(ours, expected, rtol=1e-5, atol=1e-6):
            return offset, gated
    return None


_GATES: dict[tuple[type, type], bool] = {}  # one module of each class is tried


def is_swiglu(experts: Any) -> bool:
    """Whether an experts module computes silu(gate) * up, with the gates first."""
    kind = (type(experts), type(experts.act_fn))
    if kind not in _GATES:
        gate_up = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
        ours = swiglu(gate_up)
        _GATES[kind] = torch.allclose(experts._apply_gate(gate_up), ours, atol=1e-6)
    return _GATES[kind]
