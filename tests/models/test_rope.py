"""Rotary embeddings: what transformers makes of a config, and the keys that llama.cpp reads."""

from __future__ import annotations

from typing import Any

import pytest
from gguf import GGUFValueType, Keys

from reap2gguf.checkpoint.config import ConfigReader
from reap2gguf.errors import UnsupportedModelError
from reap2gguf.models.rope import read_rope


def reader(config: dict[str, Any]) -> ConfigReader:
    return ConfigReader({"max_position_embeddings": 512} | config, "here/config.json")


def refusal(config: dict[str, Any]) -> str:
    with pytest.raises(UnsupportedModelError) as caught:
        read_rope(reader(config))
    message = str(caught.value)
    assert message.startswith("here/config.json: ")
    return message


def keys_of(config: dict[str, Any]) -> dict[str, Any]:
    found = read_rope(reader(config)).metadata()
    return {key.removeprefix("{arch}.rope."): value for key, value, _ in found}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"rope_theta": 1e6}, {"freq_base": 1e6}),
        ({"rope_theta": 10_000, "rope_scaling": None}, {"freq_base": 10_000.0}),
        ({"rope_parameters": {"rope_theta": 5e6, "rope_type": "default"}}, {"freq_base": 5e6}),
        ({}, {"freq_base": 10_000.0}),
        ({"rope_theta": None, "rope_parameters": {"rope_theta": 5e6}}, {"freq_base": 5e6}),
        ({"rope_theta": 5e6, "rope_parameters": {"rope_type": "default"}}, {"freq_base": 5e6}),
        (
            {"rope_theta": 1e6, "rope_scaling": {"type": "linear", "factor": 2}},
            {"freq_base": 1e6, "scaling.type": "linear", "scaling.factor": 2.0},
        ),
        (
            {
                "rope_theta": 1e6,
                "rope_scaling": {
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "original_max_position_embeddings": 32768,
                },
            },
            {
                "freq_base": 1e6,
                "scaling.type": "yarn",
                "scaling.factor": 4.0,
                "scaling.original_context_length": 32768,
            },
        ),
        (
            {
                "rope_parameters": {
                    "rope_theta": 1e6,
                    "rope_type": "yarn",
                    "factor": 4,
                    "original_max_position_embeddings": 32768,
                }
            },
            {
                "freq_base": 1e6,
                "scaling.type": "yarn",
                "scaling.factor": 4.0,
                "scaling.original_context_length": 32768,
            },
        ),
    ],
)
def test_rope(config: dict[str, Any], expected: dict[str, Any]) -> None:
    assert keys_of(config) == expected


def test_rope_types_of_the_header() -> None:
    yarn = {"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 32768}
    found = read_rope(reader({"rope_theta": 1e6, "rope_scaling": yarn})).metadata()
    assert {key: kind for key, _, kind in found} == {
        Keys.Rope.FREQ_BASE: GGUFValueType.FLOAT32,
        Keys.Rope.SCALING_TYPE: GGUFValueType.STRING,
        Keys.Rope.SCALING_FACTOR: GGUFValueType.FLOAT32,
        Keys.Rope.SCALING_ORIG_CTX_LEN: GGUFValueType.UINT32,
    }


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rope_theta": None}, "rope_theta is null"),
        ({"rope_parameters": {"rope_theta": None}}, "rope_theta is null"),
        ({"rope_theta": 0}, "rope_theta is 0"),
        ({"rope_theta": -1.0}, "rope_theta is -1.0"),
        ({"rope_theta": "10000"}, "rope_theta is '10000'"),
        ({"rope_theta": True}, "rope_theta is True"),
        ({"rope_theta": float("inf")}, "rope_theta is inf"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "'llama3'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 8}}, "'dynamic'"),
        ({"rope_scaling": {"type": "longrope"}}, "'longrope'"),
        ({"rope_scaling": {"type": ["yarn"]}}, "['yarn']"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "two"}}, "factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": None}}, "factor"),
        ({"rope_scaling": YARN | {"original_max_position_embeddings": "x"}}, "original_max"),
        ({"rope_scaling": YARN | {"factor": -1}}, "factor"),
        ({"rope_scaling": "yarn"}, "rope_scaling is 'yarn'"),
        ({"rope_scaling": [YARN]}, "rope_scaling is"),
        ({"rope_parameters": ["default"]}, "rope_parameters is"),
    ],
)
def test_rope_that_is_not_implemented(changes: dict[str, Any], words: str) -> None:
    assert words in refusal(changes)


def test_yarn_without_its_original_length() -> None:
    from transformers import Qwen3MoeConfig

    config = {
        "rope_theta": 1e6,
        "max_position_embeddings": 512,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0},
    }
    expected = Qwen3MoeConfig(**config).rope_parameters["original_max_position_embeddings"]
    assert keys_of(config)["scaling.original_context_length"] == expected == 512
