"""What GLM-4.5 and later have of their own: optional biases and norms, their router's keys."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFValueType

from reap2gguf.errors import CheckpointError, UnknownTensorError, UnsupportedModelError
from reap2gguf.gguf_files.reader import GgufHeader
from reap2gguf.models.description import Plain, Router
from reap2gguf.models.from_gguf import model_from_gguf
from reap2gguf.models.glm4_moe import Glm4Moe
from reap2gguf.models.table import BY_GGUF
from reap2gguf.models.transformers_config import check_with_transformers
from tests.families.glm import GLM45, GLM46, TinyGlm4Moe
from tests.models.layouts import stored_of
from tests.models.oracles import mean_kl, of_llama_cpp, of_transformers, pruned
from tests.models.test_from_gguf import header_of


def model_of(tiny: TinyGlm4Moe = GLM45, **changes: Any) -> Glm4Moe:
    """The model of a layout, with other values in its config; `...` leaves a key out."""
    config = {k: v for k, v in (tiny.config() | changes).items() if v is not ...}
    return Glm4Moe(config, "here/config.json", tiny.tensors().keys())


def keys_of(model: Glm4Moe) -> dict[str, Any]:
    return {v.key.removeprefix("glm4moe."): v.value for v in model.gguf_metadata()}


def test_the_header() -> None:
    model = model_of(replace(GLM46, n_shared=2))
    assert keys_of(model) == {
        "block_count": 5,
        "context_length": 512,
        "embedding_length": 64,
        "feed_forward_length": 104,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "attention.key_length": 24,
        "attention.value_length": 24,
        "expert_count": 8,
        "expert_used_count": 2,
        "expert_feed_forward_length": 40,
        "nextn_predict_layers": 1,
        "rope.dimension_count": 12,  # half a head
        "expert_group_count": 1,
        "expert_group_used_count": 1,
        "expert_shared_count": 2,
        "leading_dense_block_count": 2,
        "expert_gating_func": 2,  # sigmoids
        "expert_weights_scale": 1.5,
        "expert_weights_norm": True,
        "rope.freq_base": 10000.0,
    }
    kinds = {v.key: v.value_type for v in model.gguf_metadata()}
    assert kinds["glm4moe.expert_weights_norm"] is GGUFValueType.BOOL
    assert kinds["glm4moe.expert_weights_scale"] is GGUFValueType.FLOAT32


def test_what_absent_keys_mean() -> None:
    """transformers' values, which are not those of other families."""
    absent = dict.fromkeys(
        ("norm_topk_prob", "partial_rotary_factor", "rms_norm_eps", "first_k_dense_replace",
         "n_group", "topk_group", "routed_scaling_factor"), ...
    )  # fmt: skip
    model = model_of(GLM45, **absent)
    check_with_transformers(model)
    expected = keys_of(model_of(GLM45)) | {"expert_weights_scale": 1.0}
    assert keys_of(model) == expected
    assert "expert_weights_norm" not in keys_of(model_of(GLM45, norm_topk_prob=False))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "glm4"}, "model_type is 'glm4', expected 'glm4_moe'"),
        ({"n_group": 2}, "n_group is 2, expected 1"),
        ({"topk_group": 0}, "topk_group is 0, expected 1"),
        ({"first_k_dense_replace": 3}, "first_k_dense_replace is 3, expected an integer from 0"),
        ({"mlp_layer_types": ["dense"]}, "mlp_layer_types is ['dense'], expected no such key"),
        ({"sliding_window": 4096}, "sliding_window is 4096, expected no such key"),
        ({"layer_types": ["sliding_attention"] * 3}, "layer_types is ['sliding_attention', "),
        ({"n_shared_experts": 0}, "n_shared_experts is 0, expected an integer from 1"),
        ({"n_shared_experts": ...}, "n_shared_experts is missing"),
        ({"intermediate_size": ...}, "intermediate_size is missing"),
        ({"routed_scaling_factor": 0}, "routed_scaling_factor is 0, expected a number from 0.0001"),
        ({"partial_rotary_factor": 0.3}, "7 of the 24 dimensions of a head are rotated"),
        ({"partial_rotary_factor": 2}, "partial_rotary_factor is 2"),
        ({"attention_bias": 1}, "attention_bias is 1, expected true or false"),
        ({"use_qk_norm": None}, "use_qk_norm is null"),
        ({"num_nextn_predict_layers": 2}, "num_nextn_predict_layers is 2, expected 0 or 1"),
        ({"num_mtp_layers": 0}, "num_nextn_predict_layers is 1, but num_mtp_layers is 0"),
        ({"num_experts": 4}, "num_experts is 4, but n_routed_experts is 8"),
    ],
)  # fmt: skip
def test_configs_that_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        model_of(GLM45, **changes).check_tensors(stored_of(GLM45.tensors()))
    assert words in str(caught.value)
    assert str(caught.value).startswith("here/config.json")


@pytest.mark.parametrize(
    ("tiny", "changes", "name"),
    [
        (GLM45, {"attention_bias": False}, "self_attn.q_proj.bias"),
        (GLM46, {"use_qk_norm": False}, "self_attn.q_norm.weight"),
    ],
)
def test_biases_and_norms_are_those_of_the_config(
    tiny: TinyGlm4Moe, changes: dict[str, Any], name: str
) -> None:
    stored = stored_of(tiny.tensors())
    model = model_of(tiny)
    assert model.role(f"model.layers.0.{name}") == Plain(0)
    made = {tensor.name: tensor for tensor in model.gguf_tensors(stored)}
    gguf_name = f"blk.0.attn_q{'.bias' if name.endswith('bias') else '_norm.weight'}"
    assert made[gguf_name].always_f32
    with pytest.raises(UnknownTensorError, match=name):
        model_of(tiny, **changes).check_tensors(stored)
    missing = {n: s for n, s in stored.items() if not n.endswith(name)}
    with pytest.raises(CheckpointError, match=rf"{name}.* is missing"):
        model.check_tensors(missing)


def test_the_router_and_its_bias_are_pruned_together() -> None:
    model, stored = model_of(), stored_of(GLM45.tensors())
    for name in ("gate.weight", "gate.e_score_correction_bias"):
        assert model.role(f"model.layers.2.mlp.{name}") == Router(2)
    made = {tensor.name: tensor for tensor in model.gguf_tensors(stored)}
    for layer in (1, 2, 3):
        assert made[f"blk.{layer}.exp_probs_b.bias"].always_f32
        assert made[f"blk.{layer}.ffn_gate_inp.weight"].always_f32
    assert "blk.0.exp_probs_b.bias" not in made


def test_the_bias_changes_which_experts_are_chosen() -> None:
    """What the comparisons of logits rest on."""
    tensors = GLM45.tensors()
    logits = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    scores = (logits @ tensors["model.layers.1.mlp.gate.weight"].float().T).sigmoid()
    bias = tensors["model.layers.1.mlp.gate.e_score_correction_bias"]
    chosen = [values.topk(2, dim=-1).indices.sort().values for values in (scores, scores + bias)]
    assert (chosen[0] != chosen[1]).any(-1).sum() > 16


def header(tiny: TinyGlm4Moe, **changes: Any) -> GgufHeader:
    found = header_of(model_of(tiny), stored_of(tiny.tensors()))
    metadata = {k: v for k, v in (dict(found.metadata) | changes).items() if v is not None}
    return GgufHeader(found.path, metadata, found.tensors)


def test_headers_of_others() -> None:
    """llama.cpp's converter writes no groups where the config has none, and no gating once."""
    gone = ("expert_group_count", "expert_group_used_count", "expert_gating_func")
    found = model_from_gguf(header(GLM46, **{f"glm4moe.{k}": None for k in gone}), BY_GGUF)
    assert found.model.facts == model_of(GLM46).facts
    assert found.config["use_qk_norm"]
    assert found.config["attention_bias"]


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("expert_gating_func", 1, "expert_gating_func is 1"),
        ("expert_group_count", 4, "n_group is 4"),
        ("expert_shared_count", 0, "n_shared_experts is 0"),
        ("leading_dense_block_count", 4, "leading_dense_block_count is 4"),
        ("leading_dense_block_count", None, "blk.0"),
        ("rope.dimension_count", 11, "11 of the 24"),
        ("feed_forward_length", None, "feed_forward_length is missing"),
    ],
)
def test_headers_that_cannot_be(key: str, value: Any, words: str) -> None:
    with pytest.raises((UnsupportedModelError, CheckpointError)) as caught:
        model_from_gguf(header(GLM46, **{f"glm4moe.{key}": value}), BY_GGUF)
    assert words in str(caught.value)


@pytest.mark.parametrize("tiny", [GLM45, GLM46], ids=["GLM-4.5-Air", "GLM-4.6"])
def test_logits_of_a_pruned_model(tiny: TinyGlm4Moe, tmp_path: Path) -> None:
    folder = pruned(tiny.write(tmp_path / "model"), tmp_path / "pruned", 4)
    theirs = of_transformers(folder, tiny.vocab)
    assert mean_kl(theirs, of_llama_cpp(folder, tmp_path, tiny.vocab)) < 1e-6
    assert mean_kl(of_transformers(tmp_path / "model", tiny.vocab), theirs) > 1e-4
