"""transformers' short convolutions are recognized by what they compute, and use the kernel."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.lfm2_moe import modeling_lfm2_moe
from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe
from transformers.models.qwen3_next import modeling_qwen3_next

from reap2gguf.observing.compute import kernels
from reap2gguf.observing.compute.convolution import fuse_convolutions

SOURCES = (modeling_qwen3_5_moe, modeling_qwen3_next, modeling_lfm2_moe)


def layer_of(source: ModuleType) -> torch.nn.Module:
    """A module whose class says that it stands in the file of `source`."""
    kind: Any = type("Layer", (torch.nn.Module,), {"__module__": source.__name__})
    return kind()  # type: ignore[no-any-return]


@pytest.fixture(params=SOURCES, ids=lambda source: source.__name__.rpartition(".")[2])
def source(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A file of transformers, in which the test may replace its function."""
    original = request.param.causal_conv1d_fn
    monkeypatch.setattr(request.param, "causal_conv1d_fn", original)
    return request.param


def test_every_convolution_of_transformers_is_recognized(
    source: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = source.causal_conv1d_fn
    values = torch.randn(2, 10, 7)
    weight = torch.randn(10, 3)
    kernel = kernels.causal_convolution
    calls: list[Tensor] = []

    def counted(values: Tensor, *arguments: Any) -> Tensor:
        calls.append(values)
        return kernel(values, *arguments)

    assert fuse_convolutions([layer_of(source), layer_of(source)]) == 1
    assert source.causal_conv1d_fn is not own
    replaced = source.causal_conv1d_fn
    assert fuse_convolutions([layer_of(source)]) == 1, "of a second model of this class"
    assert source.causal_conv1d_fn is replaced
    expected = own(values, weight, None, activation="silu")
    assert torch.equal(replaced(values, weight, activation="silu"), expected), "on a CPU its own"
    monkeypatch.setattr(kernels, "has_triton", lambda device: True)
    monkeypatch.setattr(kernels, "causal_convolution", counted)
    found = replaced(values, weight, None, activation="silu")
    assert torch.allclose(found, expected, atol=1e-6)
    assert len(calls) == 1


def test_another_function_of_that_name_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    def centred(hidden_states: Tensor, weight: Tensor, bias: Any = None, **others: Any) -> Tensor:
        return hidden_states

    source = ModuleType("modeling_for_a_test")
    source.causal_conv1d_fn = centred  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, source.__name__, source)
    assert fuse_convolutions([layer_of(source)]) == 0
    assert source.causal_conv1d_fn is centred
