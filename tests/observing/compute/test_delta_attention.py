"""Kimi Delta Attention by rows: transformers' results, in less memory."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.models.kimi_linear import modeling_kimi_linear as source

from reap2gguf.observing.compute.delta_attention import delta_attention, save_memory

OWN = inspect.unwrap(source.chunk_kimi_delta_attention)
ONE_BY_ONE = inspect.unwrap(source.recurrent_kimi_delta_attention)


def given(length: int, dtype: torch.dtype = torch.float32, heads: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(length)
    values = torch.randn(4, 2, length, heads, 16, generator=generator)
    decay = -torch.nn.functional.softplus(4 * values[3])  # from slow to fast
    beta = torch.rand(2, length, heads, generator=generator)
    return [one.to(dtype) for one in (*values[:3], decay, beta)]


@pytest.mark.parametrize("length", [1, 5, 64, 130])
@pytest.mark.parametrize("function", [OWN, ONE_BY_ONE], ids=["chunks", "one by one"])
def test_the_results_are_transformers_own(length: int, function: Any) -> None:
    values = given(length)
    state = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    how = {"initial_state": state, "output_final_state": True, "use_qk_l2norm_in_kernel": True}
    for ours, theirs in zip(delta_attention(*values, **how), function(*values, **how), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_other_options() -> None:
    values = given(70, torch.bfloat16)
    how = {"chunk_size": 16, "initial_state": None, "output_final_state": False}
    (ours, state), (theirs, none) = delta_attention(*values, **how), OWN(*values, **how)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    assert state is none is None
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=4e-3)


class OfKimi(torch.nn.Module):
    """A module whose class is in transformers' file."""

    __module__ = source.__name__


class Largest(TorchDispatchMode):
    """The largest tensor that anything makes, in values."""

    def __init__(self) -> None:
        super().__init__()
        self.found = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for one in tree_leaves(made):
            if isinstance(one, torch.Tensor):
                self.found = max(self.found, one.numel())
        return made


def test_nothing_is_64_times_as_large_as_the_keys() -> None:
    values = given(256, heads=1)
    found = {}
    for function in (delta_attention, OWN):
        with torch.inference_mode(), Largest() as largest:
            function(*values)
        found[function] = largest.found / values[1].numel()
    assert found[delta_attention] <= 4  # and four chunks' triangles, 64 values for 16 channels
    assert found[OWN] >= 64


def test_transformers_calls_it(monkeypatch: pytest.MonkeyPatch) -> None:
    module = OfKimi()
    # a model that was loaded in this process before has set another one
    monkeypatch.setattr(source, "chunk_kimi_delta_attention", OWN)
    assert save_memory([module]) == 1
    ours = source.chunk_kimi_delta_attention
    assert ours is not OWN
    assert save_memory([module]) == 1
    assert source.chunk_kimi_delta_attention is ours  # once
    values = given(9)
    torch.testing.assert_close(ours(*values)[0], OWN(*values)[0], rtol=1e-4, atol=1e-5)


def test_another_function_of_that_name_keeps_its_code(monkeypatch: pytest.MonkeyPatch) -> None:
    module = OfKimi()
    for other in (lambda *values, **how: (values[0], None), lambda: None):
        monkeypatch.setattr(source, "chunk_kimi_delta_attention", other)
        assert save_memory([module]) == 0
        assert source.chunk_kimi_delta_attention is other
