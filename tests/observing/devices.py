"""Devices that a test runs on: the CPU everywhere, a GPU where there is one.

With `TRITON_INTERPRET=1` Triton's interpreter runs the kernels of a GPU on a CPU.
"""

from __future__ import annotations

import os
from types import ModuleType

import pytest
import torch

GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICES = ["cpu", pytest.param("cuda", marks=GPU)]
INTERPRETED = pytest.param(
    "interpreter",
    marks=pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton and TRITON_INTERPRET=1"
    ),
)


def interpreted() -> tuple[ModuleType, ModuleType, ModuleType, ModuleType]:
    """Kernels of a layer, experts, convolutions and saliency, which Triton's interpreter runs."""
    from reap2gguf.observing.compute import (
        triton_convolution,
        triton_experts,
        triton_kernels,
        triton_saliency,
    )

    return triton_kernels, triton_experts, triton_convolution, triton_saliency
