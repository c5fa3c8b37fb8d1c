"""What a package for GPUs replaces in transformers' modules is transformers' own on a CPU."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers.integrations.hub_kernels import use_kernel_func_from_hub_with_fallback

from reap2gguf.observing.compute.by_device import follow_devices


def of_the_package(values: torch.Tensor, factor: int) -> str:
    return "the package"


def own(values: torch.Tensor, factor: int) -> str:
    return f"transformers, {factor}"


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A file of layers, one of whose functions transformers takes from a package."""
    package, source = ModuleType("for_gpus"), ModuleType("modeling_for_a_test")
    package.scan = of_the_package  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "for_gpus", package)
    monkeypatch.setitem(sys.modules, "modeling_for_a_test", source)
    source.scan = use_kernel_func_from_hub_with_fallback("scan", "for_gpus")(own)
    source.other = own  # type: ignore[attr-defined]
    source.Layer = type("Layer", (torch.nn.Module,), {"__module__": source.__name__})
    return source


def test_a_cpu_computes_by_transformers(module: Any) -> None:
    values = torch.zeros(2)
    assert module.scan(values, factor=3) == "the package", "or this test tests nothing"
    for _ in range(2):  # of several models of one class
        follow_devices([module.Layer()])
        assert module.scan(values, factor=3) == "transformers, 3"
        assert module.scan(factor=3, values=values) == "transformers, 3"
        assert module.scan(values.to("meta"), factor=3) == "the package"


def test_other_functions_stay(module: Any) -> None:
    follow_devices([module.Layer()])
    assert module.other is own


def test_layers_that_call_such_functions_have_them_replaced() -> None:
    """transformers may rename its decorator's file: then nothing would be replaced."""
    from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe as source

    layer: Any = object.__new__(source.Qwen3_5MoeGatedDeltaNet)
    names = ("torch_chunk_gated_delta_rule", "causal_conv1d_fn")
    follow_devices([layer])
    for name in names:
        assert getattr(source, name).__code__.co_name == "chosen"
