"""Rotary embeddings: what transformers makes of a config, and the keys that llama.cpp reads."""

from __future__ import annotations

import math
from typing import Any

import pytest
from gguf import GGUFValueType, Keys

from reap2gguf.checkpoint.config import ConfigReader
from reap2gguf.errors import UnsupportedModelError
from reap2gguf.models.rope import check_rotary_width, read_rope


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


SETTINGS = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
OTHER_THETA = {"rope_theta": 1e6, "rope_scaling": SETTINGS | {"rope_theta": 5e6}}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (OTHER_THETA, "rope_scaling.rope_theta is 5000000.0, but rope_theta is 1000000.0"),
        (
            {"rope_parameters": SETTINGS | {"partial_rotary_factor": 0.5},
             "partial_rotary_factor": 0.25},
            "rope_parameters.partial_rotary_factor is 0.5, but partial_rotary_factor is 0.25",
        ),
        (
            {"rope_scaling": SETTINGS, "original_max_position_embeddings": 256},
            "original_max_position_embeddings is 512, but original_max_position_embeddings is 256",
        ),
        ({"rope_scaling": SETTINGS | {"type": "linear"}}, "rope_type is 'yarn', but type is"),
        (
            {"rope_scaling": SETTINGS, "rope_parameters": SETTINGS | {"factor": 2.0}},
            "rope_parameters.factor is 2.0, but with rope_scaling beside it transformers reads 4.0",
        ),
        (
            {"rope_scaling": SETTINGS, "rope_parameters": {"rope_type": "linear", "factor": 4.0}},
            "rope_parameters.rope_type is 'linear', but with rope_scaling",
        ),
        (
            # what becomes of a published config with rope_scaling added by hand
            {"rope_scaling": SETTINGS, "rope_parameters": {"rope_theta": 1e6}},
            "rope_parameters.rope_theta is 1000000.0, but with rope_scaling",
        ),
        (
            {"rope_parameters": {"full_attention": SETTINGS, "linear_attention": None}},
            "settings of their own for 'full_attention'",
        ),
        ({"rope_parameters": SETTINGS | {"short_mscale": 1.0}}, "'short_mscale'"),
    ],
)  # fmt: skip
def test_settings_that_contradict_each_other(config: dict[str, Any], words: str) -> None:
    assert words in refusal(config)


def test_rope_scaling_completes_rope_parameters() -> None:
    """As transformers: it takes `rope_scaling` alone, which loses nothing here."""
    default = {"rope_type": "default", "rope_theta": 10_000.0}
    found = read_rope(reader({"rope_scaling": SETTINGS, "rope_parameters": default}))
    assert (found.kind, found.theta, found.factor) == ("yarn", 10_000.0, 4.0)
    both = {"rope_theta": 1e6, "rope_parameters": default | {"rope_theta": 1e6}}
    assert read_rope(reader(both | {"rope_scaling": SETTINGS})).theta == 1e6
    assert read_rope(reader({"rope_scaling": {}, "rope_parameters": SETTINGS})).kind == "yarn"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"beta_fast": 16.0}, "beta_fast is 16.0, expected 32"),
        ({"beta_slow": 2}, "beta_slow is 2, expected 1"),
        ({"extrapolation_factor": 0.5}, "extrapolation_factor is 0.5, expected 1"),
        ({"extrapolation_factor": 0}, "extrapolation_factor is 0, expected 1"),
        ({"truncate": False}, "truncate is False, expected true"),
        ({"truncate": None}, "truncate is None, expected true"),  # not true for transformers
        ({"attention_factor": 0.0}, "attention_factor is 0, expected a positive number"),
        ({"attention_factor": -1.0}, "attention_factor is -1.0"),
        ({"mscale": -1.0, "mscale_all_dim": 1.0}, "mscale is -1.0"),
        ({"factor": None}, "factor is missing"),
        ({"original_max_position_embeddings": None}, "original_max_position_embeddings is missing"),
        ({"original_max_position_embeddings": 128.0}, "original_max_position_embeddings is 128.0"),
        ({"rope_theta": 1.0}, "expected a positive number above 1"),
    ],
)
def test_yarn_that_llama_cpp_cannot_express(changes: dict[str, Any], words: str) -> None:
    assert words in refusal({"rope_parameters": SETTINGS | changes})


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attention_factor": 1.0},
        {"attention_factor": 1.5},
        {"attention_factor": None},
        {"mscale": 1.0, "mscale_all_dim": 0.5},
        {"mscale": 1.0, "mscale_all_dim": 1.0},
        {"mscale": 0.7},
        {"mscale": 0, "mscale_all_dim": 1.0},
        {"mscale": 1.0, "mscale_all_dim": 0.5, "attention_factor": 1.25},
        {"factor": 0.5},
        {"factor": 1.0, "attention_factor": 2.0},
    ],
    ids=str,
)
def test_the_attention_factor_is_transformers(changes: dict[str, Any]) -> None:
    from transformers import Qwen3MoeConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = {"rope_theta": 1e6, "rope_scaling": SETTINGS | changes}
    theirs = Qwen3MoeConfig(max_position_embeddings=2048, **config)
    _, expected = ROPE_INIT_FUNCTIONS["yarn"](theirs)
    found = read_rope(reader(config))
    assert math.isclose(found.attention_factor, expected)
    # what llama.cpp multiplies: its own factor, and the key
    factor = (SETTINGS | changes)["factor"]
    implied = 0.1 * math.log(factor) + 1 if factor > 1 else 1
    assert math.isclose(implied * keys_of(config).get("scaling.attn_factor", 1.0), expected)
    assert ("scaling.attn_factor" in keys_of(config)) is not math.isclose(implied, expected)


def test_yarns_settings_that_are_llama_cpps_own() -> None:
    own = {"beta_fast": 32.0, "beta_slow": 1.0, "extrapolation_factor": 1.0, "truncate": True}
    keys = keys_of({"rope_parameters": SETTINGS | own})
    assert keys["scaling.yarn_beta_fast"] == 32.0
    assert keys["scaling.yarn_beta_slow"] == keys["scaling.yarn_ext_factor"] == 1.0
    assert keys_of({"rope_parameters": SETTINGS | {"beta_fast": 0, "beta_slow": None}}) == keys_of(
        {"rope_parameters": SETTINGS}
    )


def test_settings_of_another_type_have_no_effect() -> None:
    config = {"rope_parameters": {"rope_type": "default", "factor": 4.0, "attention_factor": 2.0}}
    assert keys_of(config) == {"freq_base": 10_000.0}


@pytest.mark.parametrize(("width", "head_dim"), [(7, 7), (9, 36), (0, 8), (16, 8)])
def test_widths_that_cannot_be_rotated(width: int, head_dim: int) -> None:
    with pytest.raises(UnsupportedModelError, match=f"{width} of the {head_dim} dimensions"):
        check_rotary_width(read_rope(reader({})), width, head_dim)


def test_an_original_context_too_short_for_yarn() -> None:
    rope = read_rope(
        reader({"rope_parameters": SETTINGS | {"original_max_position_embeddings": 1}})
    )
    with pytest.raises(UnsupportedModelError, match="no dimension between its betas"):
        check_rotary_width(rope, 16, 16)
    check_rotary_width(read_rope(reader({"rope_parameters": SETTINGS})), 16, 16)
