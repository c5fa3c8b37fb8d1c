from __future__ import annotations

from typing import Any

import pytest

from reap2gguf.checkpoint.config import ConfigReader
from reap2gguf.errors import UnsupportedModelError
from reap2gguf.models.gemma4_config import SLIDING, read_full_heads, read_ropes, read_types
from reap2gguf.models.layer_types import FULL

TYPES = (SLIDING, FULL)
BY_LAYER = {"1": {"head_dim": 32, "num_key_value_heads": 1}}
USUAL = {"head_dim": 16, "num_key_value_heads": 2}


def read(**values: Any) -> ConfigReader:
    return ConfigReader(values, "here")


def test_types_without_a_list_are_transformers() -> None:
    assert read_types(read(), 7) == (*[SLIDING] * 5, FULL, FULL)
    assert read_types(read(layer_types=[SLIDING, FULL]), 2) == TYPES


@pytest.mark.parametrize(
    ("types", "said"),
    [
        ([FULL], "expected 2 of sliding_attention and full_attention"),
        ([FULL, "linear_attention"], "expected 2 of sliding_attention and full_attention"),
        ("full_attention", "expected 2 of sliding_attention and full_attention"),
        ([SLIDING, SLIDING], "the last of them full_attention"),
        ([FULL, FULL], "expected layers of both kinds"),
    ],
)
def test_types_that_are_refused(types: Any, said: str) -> None:
    with pytest.raises(UnsupportedModelError, match=said):
        read_types(read(layer_types=types), 2)


@pytest.mark.parametrize(
    ("values", "shared", "heads"),
    [
        ({"global_head_dim": 32, "num_global_key_value_heads": 1}, True, (32, 1)),
        ({"global_head_dim": 32, "num_global_key_value_heads": 1}, False, (32, 2)),
        ({"global_head_dim": 32, "num_global_key_value_heads": None}, True, (32, 2)),
        ({}, True, (512, 2)),
        ({"per_layer_config": BY_LAYER}, True, (32, 1)),
        ({"per_layer_config": {"1": {"num_key_value_heads": 1}}}, True, (16, 1)),
        ({"per_layer_config": BY_LAYER, "global_head_dim": 32}, True, (32, 1)),
    ],
)
def test_heads_of_full_layers(values: dict[str, Any], shared: bool, heads: tuple[int, int]) -> None:
    found = read_full_heads(read(**USUAL, **values), TYPES, shared)
    assert (found.head_dim, found.n_kv_heads) == heads


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"per_layer_config": {}}, "expected the same head_dim and num_key_value_heads"),
        ({"per_layer_config": None}, "expected the same head_dim"),
        ({"per_layer_config": {"0": {"head_dim": 32}}}, "each of the layers 1, which have full"),
        ({"per_layer_config": {"1": {"hidden_size": 8}}}, "and nothing else"),
        ({"per_layer_config": {"1": 3}}, "and nothing else"),
        ({"per_layer_config": 5}, "per_layer_config is 5, expected an object"),
        (
            {"per_layer_config": BY_LAYER, "global_head_dim": 64},
            "per_layer_config.head_dim is 32, but global_head_dim is 64",
        ),
        ({"global_head_dim": 31}, "heads of 16 and 31, expected even numbers"),
        ({"global_head_dim": "32"}, "global_head_dim is '32', expected an integer"),
        ({"global_head_dim": 32, "num_global_key_value_heads": 0}, "is 0, expected an integer"),
    ],
)
def test_heads_that_are_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(UnsupportedModelError, match=said):
        read_full_heads(read(**USUAL, **values), TYPES, True)


def rope(full: Any = None, sliding: Any = None) -> dict[str, Any]:
    usual = {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.5}
    plain = {"rope_type": "default", "rope_theta": 1e4}
    return {FULL: full or usual, SLIDING: sliding or plain}


def test_rotary_embeddings() -> None:
    found = read_ropes(read(rope_parameters=rope()))
    assert (found[FULL].theta, found[SLIDING].theta) == (1e6, 1e4)
    assert found[FULL].config_values() == rope()[FULL]
    absent = read_ropes(read())
    assert absent[FULL].values.values["partial_rotary_factor"] == 0.25


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"rope_parameters": None}, "rope_parameters is null"),
        ({"rope_parameters": {"rope_theta": 5.0}}, "expected settings for full_attention and"),
        ({"rope_parameters": {FULL: rope()[FULL]}}, "expected settings for full_attention and"),
        ({"rope_parameters": rope(sliding=3)}, "expected settings for"),
        ({"rope_parameters": rope(full={"rope_type": "yarn"})}, "expected the rope_type propor"),
        (
            {"rope_parameters": rope(sliding=rope()[SLIDING] | {"partial_rotary_factor": 0.5})},
            "expected the rope_type default with rope_theta alone",
        ),
        ({"rope_parameters": rope(full=rope()[FULL] | {"factor": 2.0})}, "llama.cpp's gemma4 has"),
        ({"rope_parameters": rope(full=rope()[FULL] | {"rope_theta": 0})}, "a positive number"),
        (
            {"rope_parameters": rope(full=rope()[FULL] | {"partial_rotary_factor": 2})},
            "partial_rotary_factor is 2, expected a number from 0 to 1",
        ),
        ({"rope_parameters": rope(), "rope_theta": 1e4}, "rope_theta is 10000.0, expected no such"),
        ({"rope_parameters": rope(), "rope_scaling": {"a": 1}}, "expected no such key"),
    ],
)
def test_rotary_embeddings_that_are_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(UnsupportedModelError, match=said):
        read_ropes(read(**values))
