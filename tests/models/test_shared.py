"""What families share, on a synthetic one: seams that no family in the table uses yet."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFValueType

from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.checkpoint.config import ConfigReader
from reap2gguf.errors import CheckpointError, UnknownTensorError, UnsupportedModelError
from reap2gguf.models.description import Dropped, Plain, Router, experts_of
from reap2gguf.models.facts import COUNT_KEYS
from reap2gguf.models.layer_types import moe_layers_after_dense, moe_layers_by_step
from reap2gguf.models.rules import TensorRule, sizes_of
from reap2gguf.models.table import ARCHITECTURES, describe
from reap2gguf.observing.mtp import MtpBlock
from reap2gguf.observing.targets import layer_targets
from reap2gguf.pruning.view import PrunedView
from tests.models.layouts import rows_of_slabs, stored_of
from tests.models.synthetic import BIAS, ROUTER, SyntheticMoe, TinySynthetic

BASE = TinySynthetic()
MOE = "model.layers.1.block_sparse_moe."


@pytest.fixture(autouse=True)
def in_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ARCHITECTURES, "SyntheticMoe", SyntheticMoe)


def model_of(
    tiny: TinySynthetic = BASE,
    keep_mtp: bool = True,
    family: type[SyntheticMoe] = SyntheticMoe,
    **changes: Any,
) -> SyntheticMoe:
    config = tiny.config() | changes
    return family(config, "here/config.json", tiny.tensors().keys(), keep_mtp)


def reader(**values: Any) -> ConfigReader:
    return ConfigReader({"num_hidden_layers": 4} | values, "here/config.json")


def test_sizes() -> None:
    sizes = {"H": 64, "KV": 16}
    assert sizes_of("1 2H KV 4", sizes) == (1, 128, 16, 4)
    assert sizes_of("", sizes) == ()


def test_every_stored_value_is_used_once() -> None:
    tensors = BASE.tensors()
    stored = stored_of(tensors)
    model = model_of()
    model.check_tensors(stored)
    used = rows_of_slabs(model.gguf_tensors(stored), stored)
    assert len(used) == len(set(used)) == sum(len(tensor) for tensor in tensors.values())


def test_dense_layers_have_no_experts() -> None:
    model = model_of()
    assert model.facts.moe_layers == (1, 2, 3)  # the last is the MTP block's
    assert model.role("model.layers.0.mlp.up_proj.weight") == Plain(0)
    for name in ("0.block_sparse_moe.gate.weight", "1.mlp.up_proj.weight"):
        with pytest.raises(UnknownTensorError, match=re.escape(name)):
            model.role(f"model.layers.{name}")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"lead": 1}, (1, 2, 3)),
        ({"lead": 0}, (0, 1, 2, 3)),
        ({"lead": 4}, ()),
        ({"mlp_layer_types": ["dense", "sparse", "dense", "sparse"]}, (1, 3)),
        ({"lead": 3, "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]}, (1, 2, 3)),
    ],
)
def test_layers_after_the_dense_ones(values: dict[str, Any], expected: tuple[int, ...]) -> None:
    assert moe_layers_after_dense(reader(**values), "lead") == expected


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, "lead is missing"),
        ({"lead": 5}, "lead is 5"),
        ({"mlp_layer_types": ["sparse"] * 3}, "expected 4 of dense and sparse"),
        ({"mlp_layer_types": ["sparse"] * 3 + ["other"]}, "mlp_layer_types is"),
        ({"mlp_layer_types": "sparse"}, "mlp_layer_types is 'sparse'"),
    ],
)
def test_dense_layers_that_are_not_told(values: dict[str, Any], words: str) -> None:
    with pytest.raises(UnsupportedModelError, match=words):
        moe_layers_after_dense(reader(**values), "lead")


def test_layers_by_step() -> None:
    assert moe_layers_by_step(reader(decoder_sparse_step=2, mlp_only_layers=[1])) == (3,)


def test_a_model_of_dense_layers_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="every layer is dense"):
        model_of(replace(BASE, mtp=False), first_k_dense_replace=3)


def test_every_spelling_of_the_count_is_rewritten() -> None:
    counts = dict.fromkeys(COUNT_KEYS, 8)
    after = model_of(**counts).pruned_config(4)
    assert {key: after[key] for key in COUNT_KEYS} == dict.fromkeys(COUNT_KEYS, 4)


def test_counts_in_nested_configs_are_rewritten() -> None:
    class Nested(SyntheticMoe):
        text_sections = ("thinker_config", "text_config")

    text = BASE.config()
    other = {"num_experts": 7}
    config = {
        "architectures": ["SyntheticMoe"],
        "thinker_config": {"text_config": text, "audio_config": other},
        "talker_config": {"text_config": other},
    }
    model = Nested(config, "here/config.json", BASE.tensors().keys())
    assert model.facts.n_experts == 8
    after = model.pruned_config(4)
    assert after["thinker_config"] == {
        "text_config": text | {"n_routed_experts": 4},
        "audio_config": other,
    }
    assert after["talker_config"] == {"text_config": other}


def test_a_third_router_tensor() -> None:
    model = model_of()
    assert model.role(MOE + "gate.weight") == Router(1)
    assert model.role(MOE + "e_score_correction_bias") == Router(1)
    stored = stored_of(BASE.tensors())
    made = {tensor.name: tensor for tensor in model.gguf_tensors(stored)}
    bias = made["blk.1.exp_probs_b.bias"]
    assert (bias.shape, bias.always_f32, bias.never_quantized) == ((8,), True, True)
    assert experts_of(bias.name, bias.shape) == 8


def test_a_router_tensor_with_experts_on_its_second_axis() -> None:
    class Wide(SyntheticMoe):
        router = (ROUTER, replace(BIAS, shape="1 E"))

    name = MOE + "e_score_correction_bias"
    tensors = {
        key: tensor[None] if key.endswith("_bias") else tensor
        for key, tensor in BASE.tensors().items()
    }
    model = model_of(family=Wide)
    assert model.role(name) == Router(1, axis=1)
    model.check_tensors(stored_of(tensors))
    assert experts_of("blk.1.exp_probs_b.bias", (1, 8)) == 8
    with pytest.raises(CheckpointError, match="expected 8 experts on its last axis"):
        model.check_tensors(stored_of(tensors | {name: torch.ones(1, 7)}))


@pytest.mark.parametrize("axis", [0, 1])
def test_the_router_is_pruned_as_a_whole(
    axis: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = BASE.tensors()
    if axis == 1:

        class Wide(SyntheticMoe):
            router = (ROUTER, replace(BIAS, shape="1 E"))

        monkeypatch.setitem(ARCHITECTURES, "SyntheticMoe", Wide)
        tensors = {n: t[None] if n.endswith("_bias") else t for n, t in tensors.items()}
    kept = {1: (0, 3, 5, 7), 2: (1, 2, 4, 6), 3: (0, 1, 4, 5)}
    with Checkpoint.open(BASE.write(tmp_path / "model", tensors)) as source:
        view = PrunedView(source, describe(source), kept)
        for layer, ids in kept.items():
            prefix = f"model.layers.{layer}.block_sparse_moe."
            for name, along, dtype in (
                ("gate.weight", 0, "BF16"),
                ("e_score_correction_bias", axis, "F32"),
            ):
                expected = tensors[prefix + name].index_select(along, torch.tensor(ids))
                found = torch.from_numpy(view.read_float32(prefix + name))
                assert torch.equal(found, expected.float())
                assert view.tensors[prefix + name].dtype == dtype
            for new, old in enumerate(ids):
                found = torch.from_numpy(view.read_float32(f"{prefix}experts.{new}.w2.weight"))
                assert torch.equal(found, tensors[f"{prefix}experts.{old}.w2.weight"].float())


def test_groups_are_in_the_header() -> None:
    def keys(tiny: TinySynthetic) -> dict[str, Any]:
        values = model_of(tiny).gguf_metadata()
        return {v.key: (v.value, v.value_type) for v in values if "_group_" in v.key}

    assert keys(BASE) == {
        "synthetic.expert_group_count": (2, GGUFValueType.UINT32),
        "synthetic.expert_group_used_count": (1, GGUFValueType.UINT32),
    }
    assert keys(replace(BASE, n_groups=1)) == {}


def test_groups_that_do_not_divide_the_experts() -> None:
    with pytest.raises(
        UnsupportedModelError, match=r"8 experts, expected a multiple of .* 3 group"
    ):
        model_of(replace(BASE, n_groups=3))


def test_names_on_disk_and_in_the_module(tmp_path: Path) -> None:
    with Checkpoint.open(BASE.write(tmp_path / "model")) as checkpoint:
        model = describe(checkpoint)
        targets = layer_targets(checkpoint, model, 2, torch.bfloat16, True)
    assert set(targets) == {
        "input_layernorm.weight",
        "post_attention_layernorm.weight",
        *(f"self_attn.{name}_proj.weight" for name in "qkvo"),
        "mlp.gate.weight",
        "mlp.gate.e_score_correction_bias",
        "mlp.experts.gate_up_proj",
        "mlp.experts.down_proj",
    }
    assert targets["mlp.experts.gate_up_proj"].shape == (8, 12, 16)
    assert model.matrices(2) == {
        "self_attn.q_proj": tuple(f"blk.2.attn_{name}.weight" for name in "qkv"),
        "self_attn.o_proj": ("blk.2.attn_output.weight",),
        "mlp.gate": ("blk.2.ffn_gate_inp.weight",),
    }


def test_what_the_module_keeps_in_float32_is_not_rounded(tmp_path: Path) -> None:
    """Rounding a score-correction bias changes which experts are chosen."""
    bias = "mlp.gate.e_score_correction_bias"
    with Checkpoint.open(BASE.write(tmp_path / "model")) as checkpoint:
        model = describe(checkpoint)
        dtypes = {bias: torch.float32}
        targets = layer_targets(checkpoint, model, 1, torch.bfloat16, True, dtypes)
    assert targets.pop(bias).dtype == torch.float32
    assert {target.dtype for target in targets.values()} == {torch.bfloat16}


def test_an_mtp_block_that_is_one_more_layer(tmp_path: Path) -> None:
    with Checkpoint.open(BASE.write(tmp_path / "model")) as checkpoint:
        model = describe(checkpoint)
        targets = layer_targets(checkpoint, model, 3, torch.bfloat16, True)
    assert (model.facts.has_mtp, model.facts.mtp_layer, model.facts.n_blocks) == (True, 3, 4)
    layer = torch.nn.Module()
    layer.input_layernorm = torch.nn.RMSNorm(16)
    block = MtpBlock(torch.nn.RMSNorm(16), layer, 16, 1e-5)
    names = {name for name, _ in block.named_parameters()}
    assert names <= set(targets)
    assert targets["fc.weight"].shape == (16, 32)
    inside = {name.removeprefix("layer.") for name in targets if name.startswith("layer.")}
    assert inside | names - {"layer.input_layernorm.weight"} >= {"mlp.gate.weight", "norm.weight"}
    assert len(targets) == len(inside) + 4
    assert model.experts_path(3) == "layer.mlp.experts"
    assert f"{model.experts_path(3)}.down_proj" in targets
    matrices = model.matrices(3)
    assert matrices["fc"] == ("blk.3.nextn.eh_proj.weight",)
    assert matrices["layer.self_attn.q_proj"][2] == "blk.3.attn_v.weight"
    made = [tensor.name for tensor in model.gguf_tensors(stored_of(BASE.tensors()))]
    assert made[-4:] == [
        f"blk.3.nextn.{n}.weight" for n in ("eh_proj", "enorm", "hnorm", "shared_head_norm")
    ]


def test_an_mtp_block_that_is_dropped() -> None:
    model = model_of(keep_mtp=False)
    assert (model.facts.has_mtp, model.facts.moe_layers) == (False, (1, 2))
    assert model.role("model.layers.3.eh_proj.weight") == Dropped()
    assert model.role("model.layers.3.block_sparse_moe.experts.0.w1.weight") == Dropped()
    model.check_tensors(stored_of(BASE.tensors()))


def test_without_an_mtp_block_its_layer_is_unknown() -> None:
    with pytest.raises(UnknownTensorError, match=r"layers\.3\."):
        model_of(replace(BASE, mtp=False)).role("model.layers.3.input_layernorm.weight")


def test_the_error_for_an_unexplained_name_tells_the_file() -> None:
    with pytest.raises(UnknownTensorError, match=r"a rule for it to tests/models/synthetic\.py"):
        model_of().role("extra")


def test_a_rule_feeds_the_module_that_it_shares_its_input_with() -> None:
    rule = TensorRule("a.weight", "x.weight", "H H", input_of="b")
    assert rule.fed_by == "b"
    assert replace(rule, input_of="").fed_by == "a"
    assert replace(rule, input_of="", parameter="c.d.weight").fed_by == "c.d"
    for other in ("H", "H 1 H"):
        assert replace(rule, shape=other).fed_by is None
    assert replace(rule, stored="a.bias").fed_by is None
