"""Kimi Delta Attention: what a config says of it, and what becomes of its tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from reap2gguf.checkpoint.config import ConfigReader
from reap2gguf.errors import UnsupportedModelError
from reap2gguf.models.kda import TRANSFORMS, KdaHeads, read_kda_heads, read_kda_layers

SECTION = {
    "full_attn_layers": [3],
    "kda_layers": [1, 2, 4],
    "num_heads": 2,
    "head_dim": 16,
    "short_conv_kernel_size": 3,
}
TYPES = ["linear_attention", "linear_attention", "full_attention", "linear_attention"]


def reader(**values: Any) -> ConfigReader:
    return ConfigReader(values, "here/config.json")


def test_sizes_in_the_section_and_beside_it() -> None:
    flat = {"linear_num_heads": 2, "linear_head_dim": 16, "linear_conv_kernel_dim": 3}
    expected = KdaHeads(2, 16, 3)
    for config in ({"linear_attn_config": SECTION}, flat, flat | {"linear_attn_config": SECTION}):
        assert read_kda_heads(reader(**config)) == expected
    assert expected.config_values() == flat
    assert read_kda_heads(reader()) == KdaHeads(32, 128, 4)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"linear_attn_config": 3}, "linear_attn_config is 3, expected an object"),
        ({"linear_attn_config": SECTION | {"head_dim": None}}, "head_dim is null"),
        ({"linear_attn_config": SECTION | {"num_heads": 0}}, "linear_attn_config.num_heads is 0"),
        ({"linear_attn_config": SECTION, "linear_head_dim": 8}, "linear_head_dim is 8; both"),
        ({"linear_conv_kernel_dim": 1}, "reach over 1 token"),
    ],
)
def test_sizes_that_are_refused(config: dict[str, Any], said: str) -> None:
    with pytest.raises(UnsupportedModelError, match=said):
        read_kda_heads(reader(**config))


@pytest.mark.parametrize(
    "config",
    [
        {"linear_attn_config": SECTION},
        {"layer_types": TYPES},
        {"layer_types": TYPES, "linear_attn_config": SECTION},
        {"layer_types": TYPES, "linear_attn_config": {"full_attn_layers": [3]}},
    ],
)
def test_layers_are_numbered_from_one(config: dict[str, Any]) -> None:
    assert read_kda_layers(reader(**config), 4) == tuple(TYPES)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({}, "layer_types is missing, and linear_attn_config.full_attn_layers and"),
        ({"linear_attn_config": {"kda_layers": [1]}}, "full_attn_layers too"),
        ({"linear_attn_config": SECTION | {"kda_layers": [1, 2]}}, r"kda_layers is \[1, 2\]"),
        ({"linear_attn_config": SECTION | {"kda_layers": [1, 2, 3, 4]}}, "is named once"),
        ({"linear_attn_config": SECTION | {"kda_layers": [1, 2, 2, 4]}}, "is named once"),
        ({"linear_attn_config": SECTION | {"full_attn_layers": [0]}}, "integers from 1 to 4"),
        ({"linear_attn_config": SECTION, "layer_types": TYPES[::-1]}, "as in layer_types"),
        ({"layer_types": TYPES[:2]}, "expected 4 of full_attention and linear_attention"),
        ({"layer_types": TYPES[:1] * 4}, "no layer is full_attention"),
        ({"layer_types": TYPES[2:3] * 4}, "no layer is linear_attention"),
    ],
)
def test_layers_that_are_refused(config: dict[str, Any], said: str) -> None:
    with pytest.raises(UnsupportedModelError, match=said):
        read_kda_layers(reader(**config), 4)


@pytest.mark.parametrize(
    ("name", "stored", "shape"),
    [("ssm_a", (1, 1, 4, 1), (1, 1, 4, 1)), ("ssm_conv1d_k.weight", (6, 1, 3), (1, 6, 1, 3))],
)
def test_transforms_and_back(name: str, stored: tuple[int, ...], shape: tuple[int, ...]) -> None:
    values = np.random.default_rng(0).normal(size=stored).astype(np.float32)
    transform = TRANSFORMS[name]
    found = transform(values)
    assert found.shape == shape
    if name == "ssm_a":
        assert (found == -torch.exp(torch.from_numpy(values)).numpy()).all()
    else:
        assert (found.reshape(stored) == values).all()
    back = np.zeros(stored, np.float32)
    transform.put_back(found, back)
    np.testing.assert_allclose(back, values, rtol=1e-6, atol=1e-6)
