"""What the families of llama.cpp's `deepseek2` have of their own: header, dense layers, router."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from gguf import GGUFValueType

from reap2gguf.errors import CheckpointError, UnsupportedModelError
from reap2gguf.models.deepseek2 import Deepseek2, Glm4MoeLite
from reap2gguf.models.from_gguf import model_from_gguf
from reap2gguf.models.table import ARCHITECTURES, BY_GGUF
from reap2gguf.models.transformers_config import check_with_transformers
from tests.families.mla import FLASH, TinyMla
from tests.models.layouts import stored_of
from tests.models.test_from_gguf import header_of

PREFIX = "deepseek2."


def model_of(tiny: TinyMla = FLASH, **changes: Any) -> Any:
    """The model of a layout, with other values in its config; `...` leaves a key out."""
    config = {k: v for k, v in (tiny.config() | changes).items() if v is not ...}
    known = ARCHITECTURES[config["architectures"][0]]
    return known(config, "here/config.json", tiny.tensors().keys())


def keys_of(model: Deepseek2) -> dict[str, Any]:
    return {v.key.removeprefix(PREFIX): v.value for v in model.gguf_metadata()}


def test_the_header() -> None:
    model = model_of(replace(FLASH, n_shared=2))
    assert keys_of(model) == {
        "block_count": 4,  # with the MTP block
        "context_length": 512,
        "embedding_length": 64,
        "feed_forward_length": 96,
        "attention.head_count": 4,
        "attention.head_count_kv": 1,  # the latents
        "attention.layer_norm_rms_epsilon": 1e-5,
        "expert_count": 8,
        "expert_used_count": 2,
        "expert_feed_forward_length": 24,
        "nextn_predict_layers": 1,
        "expert_group_count": 1,
        "expert_group_used_count": 1,
        "expert_shared_count": 2,
        "leading_dense_block_count": 1,
        "expert_gating_func": 2,  # sigmoids
        "expert_weights_scale": 1.8,
        "expert_weights_norm": True,
        "vocab_size": 512,
        "attention.q_lora_rank": 40,
        "attention.kv_lora_rank": 32,
        "attention.key_length": 48,
        "attention.value_length": 32,
        "attention.key_length_mla": 40,
        "attention.value_length_mla": 20,
        "rope.dimension_count": 16,
        "rope.freq_base": 10000.0,
    }
    kinds = {v.key: v.value_type for v in model.gguf_metadata()}
    assert kinds[PREFIX + "expert_weights_norm"] is GGUFValueType.BOOL
    assert model.facts.n_kv_heads == 1  # so quantizers count its heads as llama.cpp does
    assert "expert_weights_norm" not in keys_of(model_of(norm_topk_prob=False))


@pytest.mark.parametrize("dense_as", ["count", "types", "both"])
def test_spellings_of_dense_layers(dense_as: str) -> None:
    model = model_of(replace(FLASH, n_layers=4, n_dense=2, dense_as=dense_as))
    assert model.facts.moe_layers == (2, 3, 4)
    assert keys_of(model)["leading_dense_block_count"] == 2
    if dense_as != "count":
        check_with_transformers(model)
        return
    # transformers does not read the count, and takes one dense layer
    with pytest.raises(UnsupportedModelError, match="mlp_layer_types is read as"):
        check_with_transformers(model)


def test_without_a_word_of_dense_layers_there_is_one() -> None:
    model = model_of(first_k_dense_replace=...)
    assert model.facts.moe_layers == (1, 2, 3)
    check_with_transformers(model)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"mlp_layer_types": ["dense", "dense", "sparse"]}, "mlp_layer_types is 2, but first_k"),
        ({"mlp_layer_types": ["dense", "sparse", "dense"]}, "layer 2, the last one, is dense"),
        ({"mlp_layer_types": ["sparse", "dense", "sparse"], "first_k_dense_replace": ...},
         "expected dense layers first"),
        ({"mlp_layer_types": ["dense", "moe", "sparse"]}, "expected 3 of dense and sparse"),
        ({"first_k_dense_replace": 3}, "is dense"),
        ({"first_k_dense_replace": 4}, "first_k_dense_replace is 4"),
        ({"n_shared_experts": 0}, "n_shared_experts is 0"),
        ({"n_shared_experts": ...}, "n_shared_experts is 0 or missing"),
        ({"routed_scaling_factor": 0}, "routed_scaling_factor is 0"),
        ({"rope_interleave": False}, "rotates neighbours"),
        ({"moe_layer_freq": 2}, "moe_layer_freq is 2"),
        ({"scoring_func": "softmax"}, "scoring_func is 'softmax'"),
        ({"topk_method": "group_limited_greedy"}, "topk_method is"),
        ({"rms_norm_eps": 1e-3}, "norms latents with it"),
        ({"n_group": 8}, "at least two of the 8 experts in each group"),
        ({"n_group": 4, "topk_group": 4}, "topk_group is 4, all of n_group"),
        ({"n_group": 3}, "a multiple of the router's 3 groups"),
        ({"n_group": 2, "topk_group": 3}, "topk_group is 3"),
        ({"intermediate_size": ...}, "intermediate_size is missing"),
        ({"attention_bias": True}, "attention_bias"),
        ({"model_type": "deepseek_v3"}, "model_type is 'deepseek_v3'"),
        ({"num_nextn_predict_layers": 2}, "has one MTP block"),
    ],
    ids=str,
)  # fmt: skip
def test_values_that_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UnsupportedModelError, match=said):
        model_of(**changes).gguf_metadata()


def test_groups() -> None:
    model = model_of(n_group=4, topk_group=2)
    assert (model.facts.n_groups, model.facts.groups_per_token) == (4, 2)
    keys = keys_of(model)
    assert (keys["expert_group_count"], keys["expert_group_used_count"]) == (4, 2)


@pytest.mark.parametrize(("layers", "vocabulary"), [(26, 512), (27, 512), (48, 128_256)])
def test_numbers_of_layers_that_llama_cpp_takes_for_another_model(
    layers: int, vocabulary: int
) -> None:
    tiny = replace(FLASH, n_layers=3, mtp=False)
    changes = {"num_hidden_layers": layers, "vocab_size": vocabulary}
    model = model_of(tiny, **changes)
    assert any("llama.cpp cannot load them" in caveat for caveat in model.caveats())
    whole = model_of(tiny, **changes, q_lora_rank=None)
    assert not whole.caveats()
    assert "attention.q_lora_rank" not in keys_of(whole)


def test_queries_of_one_product_are_said_to_be() -> None:
    """Else llama.cpp loads models of certain numbers of layers alone."""
    model = model_of(replace(FLASH, query_rank=None))
    assert keys_of(model)["attention.q_lora_rank"] == 0
    assert not model.caveats()


def header(tiny: TinyMla = FLASH, **changes: Any) -> Any:
    """The header of a layout's file; `...` leaves a key out."""
    found = header_of(model_of(tiny), stored_of(tiny.tensors()))
    metadata = found.metadata | {PREFIX + k.replace("__", "."): v for k, v in changes.items()}
    return replace(found, metadata={k: v for k, v in metadata.items() if v is not ...})


def test_a_file_says_which_class_it_is() -> None:
    found = model_from_gguf(header(), BY_GGUF)
    assert type(found.model) is Glm4MoeLite
    assert found.config["mlp_layer_types"] == ["dense", "sparse", "sparse"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"expert_gating_func": 4}, "not implemented, expected one of deepseek_v2, deepseek_v3"),
        ({"attention__head_count_kv": 4}, "the only head"),
        ({"attention__key_length": 40}, "the only head"),
        ({"attention__key_length_mla": 16}, "key_length_mla is 16"),
        ({"attention__temperature_scale": 0.5}, "no temperature here"),
        ({"attention__kv_lora_rank": ...}, "kv_lora_rank is missing"),
        ({"leading_dense_block_count": 4}, "leading_dense_block_count is 4"),
        ({"leading_dense_block_count": 2}, r"blk\.1\.ffn_gate\.weight' is missing"),
    ],
    ids=str,
)
def test_headers_that_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises((UnsupportedModelError, CheckpointError), match=said):
        model_from_gguf(header(**changes), BY_GGUF)
