"""What Kimi-Linear has of its own: spellings, the header, what is refused, its tokenizer's end."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.errors import CheckpointError, UnsupportedModelError
from reap2gguf.models.from_gguf import model_from_gguf
from reap2gguf.models.kimi_linear import KimiLinear
from reap2gguf.models.table import BY_GGUF
from reap2gguf.models.transformers_config import check_with_transformers
from reap2gguf.observing.targets import layer_targets
from tests.families.kimi_linear import TINY, TinyKimiLinear
from tests.models.layouts import stored_of
from tests.models.test_from_gguf import header_of

SAVED = replace(TINY, as_saved=True)
PREFIX = "kimi-linear."


def model_of(tiny: TinyKimiLinear = TINY, **changes: Any) -> KimiLinear:
    """The model of a layout, with other values in its config; `...` leaves a key out."""
    config = {k: v for k, v in (tiny.config() | changes).items() if v is not ...}
    return KimiLinear(config, "here/config.json", tiny.tensors().keys())


def keys_of(model: KimiLinear) -> dict[str, Any]:
    return {v.key.removeprefix(PREFIX): v.value for v in model.gguf_metadata()}


def test_the_header() -> None:
    assert keys_of(model_of(replace(TINY, n_shared=2))) == {
        "block_count": 3,
        "context_length": 512,
        "embedding_length": 64,
        "feed_forward_length": 96,
        "attention.head_count": 4,
        "attention.head_count_kv": [0, 1, 0],  # the latents
        "attention.layer_norm_rms_epsilon": 1e-5,
        "expert_count": 8,
        "expert_used_count": 2,
        "expert_feed_forward_length": 24,
        "expert_group_used_count": 1,
        "expert_gating_func": 2,  # sigmoids
        "attention.value_length": 16,  # the config's head_dim, of no effect
        "vocab_size": 512,
        "ssm.conv_kernel": 4,
        "kda.head_dim": 16,
        "attention.kv_lora_rank": 32,
        "attention.key_length": 40,
        "attention.key_length_mla": 32,
        "attention.value_length_mla": 20,
        "rope.dimension_count": 8,
        "expert_shared_count": 2,
        "leading_dense_block_count": 1,
        "expert_weights_scale": 2.446,
        "rope.freq_base": 10000.0,
    }
    assert "attention.value_length" not in keys_of(model_of(SAVED))


def test_the_first_layer_decides_what_quantizers_count() -> None:
    assert model_of().facts.gqa == 0
    assert model_of(replace(TINY, layers="fl", n_dense=0)).facts.gqa == 4


def test_both_spellings_are_one_model() -> None:
    published, saved = model_of(), model_of(SAVED)
    assert published.facts == saved.facts
    assert published.config_values() == saved.config_values()
    for model in (published, saved):
        check_with_transformers(model)
    assert "model.layers.0.block_sparse_moe.gate_proj.weight" in saved.shapes()
    assert saved.parameter(0, "block_sparse_moe.gate_proj.weight") == "mlp.gate_proj.weight"
    with pytest.raises(UnsupportedModelError, match="num_experts_per_token is 2, but num_exp"):
        model_of(num_experts_per_tok=3)


def test_a_published_config_is_read_without_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_with_transformers(model_of(rope_scaling=None))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_expert_group": 2}, "num_expert_group is 2.*no groups of experts"),
        ({"topk_group": 2}, "topk_group is 2"),
        ({"moe_renormalize": False}, "normalises the experts' weights"),
        ({"moe_router_activation_func": "softmax"}, "moe_router_activation_func is 'softmax'"),
        ({"moe_layer_freq": 2}, "moe_layer_freq is 2"),
        ({"q_lora_rank": 24}, "makes queries by one product"),
        ({"mla_use_nope": False}, "rotates nothing"),
        ({"num_nextn_predict_layers": 1}, "num_nextn_predict_layers is 1"),
        ({"rms_norm_eps": 1e-3}, "norms latents with it, and transformers with 1e-06"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "nothing is rotated"),
        ({"tie_word_embeddings": True}, "loads no other model"),
        ({"model_type": "kimi_k2"}, "model_type is 'kimi_k2'"),
        ({"linear_attn_config": TINY.config()["linear_attn_config"] | {"num_heads": 2}},
         "linear attention has 2 heads"),
        ({"mlp_layer_types": ["dense", "dense", "sparse"]}, "mlp_layer_types is 2, but first_k"),
        ({"mlp_layer_types": ["sparse", "dense", "sparse"], "first_k_dense_replace": ...},
         "expected dense layers first"),
        ({"num_shared_experts": 0}, "num_shared_experts is 0"),
        ({"pad_token_id": ...}, "pad_token_id is missing"),
        ({"head_dim": 0}, "head_dim is 0"),
    ],
    ids=str,
)  # fmt: skip
def test_values_that_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UnsupportedModelError, match=said):
        model_of(**changes).gguf_metadata()


def test_without_a_word_of_dense_layers_there_is_one() -> None:
    model = model_of(first_k_dense_replace=...)
    assert model.facts.moe_layers == (1, 2)
    check_with_transformers(model)


@pytest.mark.parametrize("reverse", [False, True])
def test_convolutions_are_joined_in_their_order(reverse: bool, tmp_path: Path) -> None:
    """transformers has one convolution of queries, keys and values; names are sorted otherwise."""
    folder, parts = TINY.write(tmp_path / "model"), TINY.tensors()
    path = "model.layers.0.self_attn."
    with Checkpoint.open(folder) as checkpoint:
        names = sorted(checkpoint.tensors, reverse=reverse)
        model = KimiLinear.of(checkpoint)
        found = layer_targets(checkpoint, model, 0, torch.float32, True, names=names)
        target = found["self_attn.conv1d.weight"]
        runs = [(run.stored, run.target_start) for run in target.runs]
    assert target.shape == (192, 1, 4)
    assert runs == [(f"{path}{one}_conv1d.weight", 256 * i) for i, one in enumerate("qkv")]
    assert parts[f"{path}q_conv1d.weight"].numel() == 256


def header(**changes: Any) -> Any:
    """The header of the published layout's file; `...` leaves a key out."""
    found = header_of(model_of(), stored_of(TINY.tensors()))
    metadata = found.metadata | {PREFIX + k.replace("__", "."): v for k, v in changes.items()}
    return replace(found, metadata={k: v for k, v in metadata.items() if v is not ...})


def test_a_file_is_read_back() -> None:
    found = model_from_gguf(header(), BY_GGUF)
    assert type(found.model) is KimiLinear
    assert found.config["linear_attn_config"] == TINY.config()["linear_attn_config"]
    check_with_transformers(found.model)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"expert_gating_func": 1}, "expert_gating_func is 1"),
        ({"expert_group_count": 2}, "expert_group_count is 2"),
        ({"attention__head_count_kv": [0, 1, 2]}, "expected 0 or one number"),
        ({"attention__head_count_kv": [0, 2, 0]}, "the only head"),
        ({"attention__key_length": 24}, "the only head"),
        ({"attention__q_lora_rank": 16}, "queries are one product"),
        ({"kda__head_dim": ...}, "kda.head_dim is missing"),
        ({"kda__head_dim": 8}, "has the shape"),
    ],
    ids=str,
)
def test_headers_that_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises((UnsupportedModelError, CheckpointError), match=said):
        model_from_gguf(header(**changes), BY_GGUF)
