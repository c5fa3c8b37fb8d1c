"""The random test models hide no exchange: no two of their tensors, experts or rows are equal."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from tests.tiny import TinyQwen3Moe, TinyQwen35Moe

MODELS = {
    "qwen3": TinyQwen3Moe(),
    "qwen3, fused": TinyQwen3Moe(fused=True, dense_layers=(1,)),
    "qwen3.5": TinyQwen35Moe(),
    "qwen3.5, another order": TinyQwen35Moe(layers="lflfl", fused_mtp=True, value_heads=4),
}


@pytest.mark.parametrize("name", MODELS)
def test_no_two_tensors_are_equal(name: str) -> None:
    tensors = MODELS[name].tensors()
    for (first, one), (second, other) in combinations(tensors.items(), 2):
        assert not (one.shape == other.shape and torch.equal(one, other)), (first, second)
    assert all(tensor.any() for tensor in tensors.values())


@pytest.mark.parametrize("name", MODELS)
def test_no_two_entries_of_a_tensor_are_equal(name: str) -> None:
    for tensor_name, tensor in MODELS[name].tensors().items():
        if tensor.ndim > 1:
            entries = tensor.reshape(len(tensor), -1)
            assert len(torch.unique(entries, dim=0)) == len(entries), tensor_name


@pytest.mark.parametrize("name", MODELS)
def test_halves_of_a_tensor_differ(name: str) -> None:
    """Gate and up, the two frames of a patch: an exchange of halves shows as well."""
    for tensor_name, tensor in MODELS[name].tensors().items():
        for axis, size in enumerate(tensor.shape):
            if tensor.ndim > 1 and size > 1 and size % 2 == 0:
                low, high = tensor.chunk(2, dim=axis)
                assert not torch.equal(low, high), (tensor_name, axis)
