"""Lets transformers' short causal convolutions compute by the kernel of `kernels.py`.

DeltaNet and LFM2's layers have one before what they mix tokens with. Without the package
causal-conv1d transformers computes it by torch's general convolution, which wants tokens last: it
copies them there and back, and took 29 % of Qwen3.5's GPU time on an H100 (bench/RESULTS.md).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from reap2gguf.observing.compute import kernels

_NAME = "causal_conv1d_fn"  # of transformers' function, and of the package's
_ACTIVATIONS = {None: False, "silu": True, "swish": True}
_OURS = "__computes_by_kernel__"


def fuse_convolutions(modules: Iterable[torch.nn.Module]) -> int:
    """Let the convolutions in the files of these modules' classes use the kernel; how many do.

    It holds for all models of these classes in this process; on a CPU nothing changes. A function
    of that name which computes something else on random values keeps its own code.
    """
    found = 0
    for name in {type(module).__module__ for module in modules}:
        source = sys.modules[name]
        function = getattr(source, _NAME, None)
        if function is None:
            continue
        if not hasattr(function, _OURS):
            if not _is_convolution(function):
                continue
            setattr(source, _NAME, _by_kernel(function))
        found += 1
    return found


def _by_kernel(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @wraps(function)
    def convolution(
        hidden_states: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        activation: str | None = None,
        **others: Any,
    ) -> Tensor:
        is_packed = any(others.get(name) is not None for name in ("seq_idx", "cu_seqlens"))
        on_gpu = kernels.has_triton(hidden_states.device)
        if not on_gpu or is_packed or activation not in _ACTIVATIONS:
            return function(hidden_states, weight, bias, activation=activation, **others)
        return _convolution(hidden_states, weight, bias, activation)

    setattr(convolution, _OURS, True)
    return convolution


def _convolution(
    hidden_states: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None
) -> Tensor:
    """As transformers' function: tokens last, (B, C, T)."""
    values = hidden_states.transpose(1, 2)
    silu = _ACTIVATIONS[activation]
    return kernels.causal_convolution(values, weight, bias, silu).transpose(1, 2)


def _is_convolution(function: Callable[..., Tensor]) -> bool:
    """Whether a function computes on random values what the kernel's formula does."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(2, 6, 5, generator=generator)  # tokens last
    weight, bias = torch.randn(6, 4, generator=generator), torch.randn(6, generator=generator)
    own = getattr(function, "__wrapped__", function)  # a package's function runs on a GPU alone
    with torch.inference_mode():
        for added, activation in ((None, "silu"), (bias, None)):
            try:
                expected = own(values, weight, added, activation=activation)
            except (TypeError, ValueError, RuntimeError):
                return False  # its arguments are not those of the function that is meant
            ours = _convolution(values, weight, added, activation)
            if expected.shape != ours.shape or not torch.allclose(ours, expected, atol=1e-5):
                return False
    return True
