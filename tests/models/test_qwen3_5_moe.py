from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGUFValueType

from reap2gguf.errors import CheckpointError, UnknownTensorError, UnsupportedModelError
from reap2gguf.models.description import Carried, Dropped, GgufTensor
from reap2gguf.models.qwen3_5_moe import Qwen35Moe
from tests.models.layouts import stored_of
from tests.tiny import TinyQwen35Moe

BASE = TinyQwen35Moe(n_experts=4, vocab=64)
LAYOUTS = {
    "the Hub's": BASE,
    "2D": replace(BASE, fused=False),
    "3D": replace(BASE, fused_mtp=True),
    "2D trunk, 3D MTP": replace(BASE, fused=False, fused_mtp=True),
    "without MTP": replace(BASE, mtp=False),
    "without tower": replace(BASE, vision=False),
    "flat": replace(BASE, nested=False),
    "flat 2D without MTP": replace(BASE, nested=False, fused=False, mtp=False),
    "tied": replace(BASE, tied=True),
    "equal heads": replace(BASE, value_heads=4),
    "other layers": replace(BASE, layers="flfl"),
}
MTP_NAMES = ("nextn.eh_proj", "nextn.enorm", "nextn.hnorm", "nextn.shared_head_norm")


def model_of(tiny: TinyQwen35Moe = BASE, keep_mtp: bool = True, **changes: Any) -> Qwen35Moe:
    """The model of a layout, with other values in its text config; `...` leaves a key out."""
    config = tiny.config()
    text = config["text_config"] if tiny.nested else config
    text |= changes
    for key in [key for key, value in changes.items() if value is ...]:
        del text[key]
    return Qwen35Moe(config, "here/config.json", tiny.tensors().keys(), keep_mtp)


def text_of(config: dict[str, Any]) -> dict[str, Any]:
    return config.get("text_config", config)


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> TinyQwen35Moe:
    return LAYOUTS[request.param]


def tensors_of(tiny: TinyQwen35Moe, keep_mtp: bool = True) -> dict[str, GgufTensor]:
    found = model_of(tiny, keep_mtp).gguf_tensors(stored_of(tiny.tensors()))
    by_name = {tensor.name: tensor for tensor in found}
    assert len(by_name) == len(found)
    return by_name


def test_facts(layout: TinyQwen35Moe) -> None:
    facts = model_of(layout).facts
    n_layers = len(layout.layers)
    assert facts.gguf_arch == gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.QWEN35MOE]
    assert facts.architecture == layout.config()["architectures"][0]
    assert (facts.n_layers, facts.has_mtp) == (n_layers, layout.mtp)
    assert facts.moe_layers == tuple(range(n_layers + layout.mtp))
    assert facts.n_blocks == n_layers + layout.mtp
    assert facts.mtp_layer == (n_layers if layout.mtp else None)
    assert (facts.n_experts, facts.experts_per_token) == (4, 2)
    assert (facts.hidden_size, facts.expert_width) == (64, 32)
    assert (facts.n_heads, facts.n_kv_heads, facts.head_dim) == (2, 1, 32)
    assert (facts.vocab_size, facts.context_length) == (64, 512)
    assert facts.tied_embeddings is layout.tied


def test_without_its_mtp_block() -> None:
    facts = model_of(keep_mtp=False).facts
    assert (facts.has_mtp, facts.mtp_layer, facts.n_blocks) == (False, None, 4)
    assert facts.moe_layers == (0, 1, 2, 3)


def test_the_tower_is_carried_and_the_block_may_be_dropped() -> None:
    for keep_mtp in (True, False):
        model = model_of(keep_mtp=keep_mtp)
        for name in BASE.tensors():
            role = model.role(name)
            assert isinstance(role, Carried) is name.startswith("model.visual.")
            assert isinstance(role, Dropped) is (name.startswith("mtp.") and not keep_mtp)


def block_shapes(tiny: TinyQwen35Moe, kind: str) -> dict[str, tuple[int, ...]]:
    hidden, width, experts = tiny.hidden, tiny.width, tiny.n_experts
    query, key = tiny.n_heads * tiny.head_dim, tiny.n_kv_heads * tiny.head_dim
    values = tiny.value_heads * tiny.linear_dim
    mixed = 2 * tiny.key_heads * tiny.linear_dim + values
    found: dict[str, tuple[int, ...]] = {
        "attn_norm.weight": (hidden,),
        "post_attention_norm.weight": (hidden,),
        "ffn_gate_inp.weight": (experts, hidden),
        "ffn_gate_inp_shexp.weight": (1, hidden),
        "ffn_gate_shexp.weight": (width, hidden),
        "ffn_up_shexp.weight": (width, hidden),
        "ffn_down_shexp.weight": (hidden, width),
        "ffn_gate_exps.weight": (experts, width, hidden),
        "ffn_up_exps.weight": (experts, width, hidden),
        "ffn_down_exps.weight": (experts, hidden, width),
    }
    if kind == "f":
        return found | {
            "attn_q.weight": (2 * query, hidden),
            "attn_k.weight": (key, hidden),
            "attn_v.weight": (key, hidden),
            "attn_output.weight": (hidden, query),
            "attn_q_norm.weight": (tiny.head_dim,),
            "attn_k_norm.weight": (tiny.head_dim,),
        }
    return found | {
        "attn_qkv.weight": (mixed, hidden),
        "attn_gate.weight": (values, hidden),
        "ssm_alpha.weight": (tiny.value_heads, hidden),
        "ssm_beta.weight": (tiny.value_heads, hidden),
        "ssm_conv1d.weight": (mixed, 4),
        "ssm_a": (tiny.value_heads,),
        "ssm_dt.bias": (tiny.value_heads,),
        "ssm_norm.weight": (tiny.linear_dim,),
        "ssm_out.weight": (hidden, values),
    }


@pytest.mark.parametrize("keep_mtp", [True, False])
def test_names_and_shapes(layout: TinyQwen35Moe, keep_mtp: bool) -> None:
    expected: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (64, 64),
        "output_norm.weight": (64,),
    }
    if not layout.tied:
        expected["output.weight"] = (64, 64)
    has_mtp = layout.mtp and keep_mtp
    for layer, kind in enumerate(layout.layers + "f" * has_mtp):
        shapes = block_shapes(layout, kind)
        expected |= {f"blk.{layer}.{name}": shape for name, shape in shapes.items()}
    if has_mtp:
        blk = f"blk.{len(layout.layers)}."
        expected |= {f"{blk}{name}.weight": (64,) for name in MTP_NAMES}
        expected[blk + "nextn.eh_proj.weight"] = (64, 128)
    found = tensors_of(layout, keep_mtp)
    assert {name: tensor.shape for name, tensor in found.items()} == expected


def test_what_stays_f32(layout: TinyQwen35Moe) -> None:
    matrices = {
        "token_embd.weight", "output.weight", "attn_q.weight", "attn_k.weight", "attn_v.weight",
        "attn_output.weight", "attn_qkv.weight", "attn_gate.weight", "ssm_alpha.weight",
        "ssm_beta.weight", "ssm_out.weight", "ffn_gate_shexp.weight", "ffn_up_shexp.weight",
        "ffn_down_shexp.weight", "ffn_gate_exps.weight", "ffn_up_exps.weight",
        "ffn_down_exps.weight", "nextn.eh_proj.weight",
    }  # fmt: skip
    for name, tensor in tensors_of(layout).items():
        bare = re.sub(r"^blk\.\d+\.", "", name)
        assert tensor.always_f32 is (bare not in matrices), name


def test_norms_are_stored_around_one(layout: TinyQwen35Moe) -> None:
    """transformers adds one to every norm but the DeltaNet's; GGUF has it added."""
    zeros, norms = np.zeros(3, dtype=np.float32), 0
    for name, tensor in tensors_of(layout).items():
        if len(tensor.shape) > 1 or "norm" not in name.replace("enorm", "norm"):
            continue
        if name.endswith("ssm_norm.weight"):
            assert tensor.transform is None
        else:
            assert tensor.transform is not None, name
            assert tensor.transform(zeros).tolist() == [1, 1, 1]
            norms += 1
    per_layer = {"l": 2, "f": 4}
    expected = 1 + sum(per_layer[kind] for kind in layout.layers) + 7 * layout.mtp
    assert norms == expected


def header_of(model: Qwen35Moe) -> dict[str, Any]:
    values = model.gguf_metadata()
    found = {value.key.removeprefix("qwen35moe."): value.value for value in values}
    assert len(found) == len(values)
    assert all(value.key.startswith("qwen35moe.") for value in values)
    return found


@pytest.mark.parametrize("keep_mtp", [True, False])
def test_the_header(layout: TinyQwen35Moe, keep_mtp: bool) -> None:
    mtp = layout.mtp and keep_mtp
    expected = {
        "block_count": len(layout.layers) + mtp,
        "context_length": 512,
        "embedding_length": 64,
        "attention.head_count": 2,
        "attention.head_count_kv": 1,
        "attention.key_length": 32,
        "attention.value_length": 32,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "attention.recurrent_layers": [kind == "l" for kind in layout.layers] + [False] * mtp,
        "expert_count": 4,
        "expert_used_count": 2,
        "expert_feed_forward_length": 32,
        "expert_shared_feed_forward_length": 32,
        "rope.dimension_count": 8,
        "rope.dimension_sections": [2, 1, 1, 0],
        "rope.freq_base": 10000.0,
        "ssm.conv_kernel": 4,
        "ssm.state_size": 16,
        "ssm.group_count": 4,
        "ssm.time_step_rank": layout.value_heads,
        "ssm.inner_size": 16 * layout.value_heads,
    }
    if mtp:
        expected["nextn_predict_layers"] = 1
    if layout.layers != "flfl":
        expected["full_attention_interval"] = 4
    assert header_of(model_of(layout, keep_mtp)) == expected


def test_header_kinds() -> None:
    kinds = {value.key: value.value_type for value in model_of().gguf_metadata()}
    floats = {"rope.freq_base", "attention.layer_norm_rms_epsilon"}
    arrays = {"attention.recurrent_layers", "rope.dimension_sections"}
    for key, kind in kinds.items():
        bare = key.removeprefix("qwen35moe.")
        assert (kind is GGUFValueType.FLOAT32) is (bare in floats)
        assert (kind is GGUFValueType.ARRAY) is (bare in arrays)


def test_layer_types_default_to_every_fourth() -> None:
    recurrent = header_of(model_of(layer_types=..., full_attention_interval=2))
    assert recurrent["attention.recurrent_layers"] == [True, False, True, False, False]
    recurrent = header_of(model_of(layer_types=..., full_attention_interval=...))
    assert recurrent["attention.recurrent_layers"] == [True, True, True, False, False]


@pytest.mark.parametrize("keep_mtp", [True, False])
def test_pruned_config(layout: TinyQwen35Moe, keep_mtp: bool) -> None:
    before = layout.config()
    model = model_of(layout, keep_mtp)
    after = model.pruned_config(3)
    expected = layout.config()
    text_of(expected)["num_experts"] = 3
    text_of(expected)["mtp_num_hidden_layers"] = int(layout.mtp and keep_mtp)
    assert after == expected
    assert list(text_of(after)) == list(text_of(before))
    assert model.config == before


def test_a_claimed_mtp_block_that_is_not_there() -> None:
    tiny = replace(BASE, mtp=False, vision=False)
    model = model_of(tiny, mtp_num_hidden_layers=1)
    assert not model.facts.has_mtp
    (caveat,) = model.caveats()
    assert "MTP block that the checkpoint does not contain" in caveat
    assert text_of(model.pruned_config(2))["mtp_num_hidden_layers"] == 0
    assert "nextn_predict_layers" not in header_of(model)


def test_an_mtp_block_that_the_config_denies() -> None:
    """Config and tensors of what is written agree, whatever the source's did."""
    model = model_of(mtp_num_hidden_layers=0)
    assert model.facts.has_mtp
    assert text_of(model.pruned_config(2))["mtp_num_hidden_layers"] == 1


def test_only_the_output_projection_has_its_columns_moved(layout: TinyQwen35Moe) -> None:
    model = model_of(layout)
    for name in tensors_of(layout):
        order = model.column_order(name)
        assert (order is not None) is name.endswith("ssm_out.weight")


def test_another_prefix_of_the_mtp_block() -> None:
    tensors = {re.sub("^mtp", "model.mtp", n): t for n, t in BASE.tensors().items()}
    model = Qwen35Moe(BASE.config(), "here/config.json", tensors.keys())
    stored = stored_of(tensors)
    model.check_tensors(stored)
    assert {t.name: t.shape for t in model.gguf_tensors(stored)} == {
        name: tensor.shape for name, tensor in tensors_of(BASE).items()
    }


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"attn_output_gate": False}, "attn_output_gate is False"),
        ({"mlp_only_layers": [1]}, "mlp_only_layers is [1]"),
        ({"mtp_num_hidden_layers": 2}, "mtp_num_hidden_layers is 2"),
        ({"mtp_use_dedicated_embeddings": True}, "mtp_use_dedicated_embeddings is True"),
        ({"layer_types": ["linear_attention"] * 3}, "expected 4 of full_attention and linear_att"),
        ({"layer_types": ["sliding_attention"] * 4}, "layer_types is ['sliding_attention', "),
        ({"layer_types": "linear_attention"}, "layer_types is 'linear_attention'"),
        ({"linear_num_value_heads": 6}, "linear_num_value_heads is 6, expected a multiple of "),
        ({"linear_num_value_heads": 2}, "linear_num_value_heads is 2, expected a multiple of "),
        ({"linear_num_key_heads": ...}, "linear_num_key_heads is missing"),
        ({"linear_value_head_dim": 32}, "linear_value_head_dim is 32"),  # llama.cpp has one size
        ({"num_experts": ...}, "num_experts is missing"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok is 5"),
        ({"shared_expert_intermediate_size": ...}, "shared_expert_intermediate_size is missing"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("nested", [True, False], ids=["nested", "flat"])
def test_configs_that_are_not_implemented(
    nested: bool, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        model_of(replace(BASE, nested=nested), **changes).gguf_metadata()
    assert words in str(caught.value)
    assert str(caught.value).startswith("here/config.json")


def test_an_mtp_block_needs_a_layer_of_full_attention() -> None:
    """The block's layer is built after the trunk's first of its kind; without one, it is said."""
    with pytest.raises(UnsupportedModelError, match="full_attention"):
        model_of(replace(BASE, layers="ll")).mtp_templates()


def test_a_quantized_checkpoint() -> None:
    config = BASE.config() | {"quantization_config": {"quant_method": "fp8"}}
    tensors = BASE.tensors()
    name = "model.language_model.layers.0.mlp.shared_expert.up_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    stored = stored_of(tensors)
    with pytest.raises(UnsupportedModelError, match=r"F8_E4M3: .* quantized .*'fp8'"):
        Qwen35Moe(config, "here/config.json", tensors.keys()).check_tensors(stored)


LAYER = "model.language_model.layers."


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",  # the flat name in a nested model
        "model.layers.0.mlp.gate.weight",
        LAYER + "4.input_layernorm.weight",
        LAYER + "0.self_attn.q_proj.weight",  # of a linear layer
        LAYER + "3.linear_attn.A_log",  # of a full one
        LAYER + "0.linear_attn.conv1d.bias",
        LAYER + "0.mlp.experts.0.gate_up_proj.weight",
        LAYER + "0.mlp.shared_expert.gate_up_proj.weight",
        "mtp.layers.1.input_layernorm.weight",
        "mtp.layers.0.linear_attn.A_log",
        "mtp.embed_tokens.weight",
        "mtp.fc.bias",
        "model.language_model.mtp.fc.weight",
    ],
)
def test_unknown_tensors(name: str) -> None:
    tensors = BASE.tensors() | {name: torch.ones(2, dtype=torch.bfloat16)}
    model = Qwen35Moe(BASE.config(), "here/config.json", tensors.keys())
    with pytest.raises(UnknownTensorError) as caught:
        model.check_tensors(stored_of(tensors))
    assert repr(name) in str(caught.value)


def test_experts_stored_twice() -> None:
    tensors = BASE.tensors() | replace(BASE, fused=False).tensors()
    model = Qwen35Moe(BASE.config(), "here/config.json", tensors.keys())
    with pytest.raises(CheckpointError, match="another tensor holds the same weights"):
        model.check_tensors(stored_of(tensors))
