"""Qwen2-MoE: what is refused by name, its biases, and its header."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from reap2gguf.errors import UnsupportedModelError
from reap2gguf.models.from_gguf import model_from_gguf
from reap2gguf.models.qwen2_moe import Qwen2Moe
from reap2gguf.models.table import BY_GGUF
from tests.families.qwen2 import TINY
from tests.models.layouts import stored_of
from tests.models.test_from_gguf import header_of


def model_of(**changes: Any) -> Qwen2Moe:
    config = {**TINY.config(), **changes}
    model = Qwen2Moe(config, "here/config.json", TINY.tensors().keys())
    model.gguf_metadata()
    return model


def values_of(model: Qwen2Moe) -> dict[str, Any]:
    return {one.key.removeprefix("qwen2moe."): one.value for one in model.gguf_metadata()}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"norm_topk_prob": True}, "norm_topk_prob is True.*does not normalise"),
        ({"qkv_bias": 1}, "qkv_bias is 1"),
        ({"qkv_bias": None}, "qkv_bias is null"),
        ({"shared_expert_intermediate_size": 0}, "shared_expert_intermediate_size is 0"),
        ({"head_dim": 32}, "head_dim 32, together 128, expected hidden_size, 64"),
        ({"use_sliding_window": True}, "qwen2moe has full attention"),
        ({"model_type": "qwen3_moe"}, "expected 'qwen2_moe'"),
    ],
    ids=str,
)
def test_what_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UnsupportedModelError, match=said):
        model_of(**changes)


def test_a_tied_head_is_refused() -> None:
    tiny = replace(TINY, tied=True)
    with pytest.raises(UnsupportedModelError, match=r"store a copy as lm_head\.weight"):
        Qwen2Moe(tiny.config(), "here/config.json", tiny.tensors().keys())


def test_biases_are_there_unless_the_config_says_otherwise() -> None:
    assert any(rule.stored.endswith(".bias") for rule in model_of().rules(0))
    assert not any(rule.stored.endswith(".bias") for rule in model_of(qkv_bias=False).rules(0))
    assert model_of(qkv_bias=False).config_values()["qkv_bias"] is False


def test_the_header() -> None:
    found = values_of(model_of())
    assert found["expert_feed_forward_length"] == 96
    assert found["expert_shared_feed_forward_length"] == 160
    assert found["feed_forward_length"] == 224
    # as llama.cpp's converter: only for a config that states the size of a head
    assert "attention.key_length" not in found
    found = values_of(model_of(head_dim=16))
    assert found["attention.key_length"] == found["attention.value_length"] == 16


def test_pruning_changes_the_weights_of_the_others() -> None:
    assert any("are not normalised" in one for one in model_of().caveats())


def test_dense_layers_are_not_for_llama_cpp() -> None:
    model = model_of(mlp_only_layers=[1])
    assert any("llama.cpp cannot load them" in caveat for caveat in model.caveats())


def test_a_file_without_the_shared_width() -> None:
    """llama.cpp then takes that of a dense layer."""
    tiny = replace(TINY, shared_width=224)
    model = Qwen2Moe(tiny.config(), "here/config.json", tiny.tensors().keys())
    header = header_of(model, stored_of(tiny.tensors()))
    del header.metadata["qwen2moe.expert_shared_feed_forward_length"]  # type: ignore[attr-defined]
    found = model_from_gguf(header, BY_GGUF)
    assert found.config["shared_expert_intermediate_size"] == 224
    assert found.config["qkv_bias"] is True
