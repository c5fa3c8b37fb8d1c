"""What is refused of decoders whose layers all have full attention, and the size of their heads."""

from __future__ import annotations

from typing import Any

import pytest

from reap2gguf.errors import UnsupportedModelError
from reap2gguf.models.table import ARCHITECTURES
from tests.models.drawn import ABSENT
from tests.models.layouts import LAYOUTS

FAMILIES = (
    "GraniteMoeForCausalLM",
    "MixtralForCausalLM",
    "OlmoeForCausalLM",
    "Qwen2MoeForCausalLM",
    "Qwen3MoeForCausalLM",
)
# whose loaders in llama.cpp are stricter
STRICT = (
    "OlmoeForCausalLM",
    "Qwen2MoeForCausalLM",
)


def model_of(architecture: str, **changes: Any) -> Any:
    tiny = next(iter(LAYOUTS[architecture].values()))
    config = {k: v for k, v in {**tiny.config(), **changes}.items() if v is not ABSENT}
    names = [
        n for n in tiny.tensors() if n != "lm_head.weight" or not config["tie_word_embeddings"]
    ]
    return ARCHITECTURES[architecture](config, "here/config.json", names)


def keys_of(model: Any) -> set[str]:
    return {one.key.removeprefix(f"{model.gguf_arch}.") for one in model.gguf_metadata()}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "unheard_of"}, "model_type is 'unheard_of', expected"),
        ({"layer_types": ["sliding_attention"] * 2}, "has full attention"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "whole heads"),
        ({"num_attention_heads": 2, "head_dim": 31}, "31 of the 31 dimensions|together 62"),
    ],
    ids=str,
)
@pytest.mark.parametrize("architecture", FAMILIES)
def test_what_is_refused(architecture: str, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UnsupportedModelError, match=said):
        model_of(architecture, **changes)


@pytest.mark.parametrize("architecture", STRICT)
def test_what_llama_cpp_does_not_load(architecture: str) -> None:
    with pytest.raises(UnsupportedModelError, match="head_dim 32, together 128, expected hidden"):
        model_of(architecture, head_dim=32)
    with pytest.raises(UnsupportedModelError, match=r"store a copy as lm_head\.weight"):
        model_of(architecture, tie_word_embeddings=True)


@pytest.mark.parametrize("architecture", FAMILIES)
def test_the_size_of_a_head_is_written_if_the_config_has_it(architecture: str) -> None:
    sizes = {"attention.key_length", "attention.value_length"}
    assert keys_of(model_of(architecture, head_dim=16)) >= sizes
    assert not keys_of(model_of(architecture, head_dim=ABSENT)) & sizes
