"""On a GPU, one kernel where transformers launches many: RMSNorm and SwiGLU.

Modules are known by what they compute, not by name: one is tried on random values, and only if a
kernel gives the same is it used. An architecture whose norm differs keeps its own.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from reap2gguf.observing.compute import kernels

_PROBE_WIDTH = 64


def fuse_norms(module: torch.nn.Module) -> int:
    """Give every RMSNorm in `module` a fused forward; how many."""
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
    return kernels.rms_norm(hidden_states, module.weight, eps, offset, gate)


@cache  # by class: modules of one kind are tried once
def _norm_recipe(kind: type[torch.nn.Module]) -> tuple[float, bool] | None:
    """(what is added to the weight, whether it takes a gate) of an RMSNorm; None for all else."""
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
        return None  # takes other arguments than any norm known here
    for offset in (0.0, 1.0):
        ours = kernels.rms_norm(values, weight[0], 1e-3, offset, gate if gated else None)
        if torch.allclose(ours, expected, rtol=1e-5, atol=1e-6):
            return offset, gated
    return None


def is_swiglu(experts: Any) -> bool:
    """Whether an experts module's gate is silu(gate) * up, with the gates first."""
    kind = (type(experts), type(experts.act_fn))
    if kind not in _GATES:
        gate_up = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
        ours = kernels.swiglu(gate_up)
        _GATES[kind] = torch.allclose(experts._apply_gate(gate_up), ours, atol=1e-6)
    return _GATES[kind]


_GATES: dict[tuple[type, type], bool] = {}  # modules of one kind are tried once
