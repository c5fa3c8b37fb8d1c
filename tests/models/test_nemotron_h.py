"""Nemotron-3: what only this family has."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.errors import CheckpointError, UnknownTensorError, UnsupportedModelError
from reap2gguf.models.description import Dropped
from reap2gguf.models.from_gguf import model_from_gguf
from reap2gguf.models.nemotron_h import NemotronH
from reap2gguf.models.table import BY_GGUF, describe
from reap2gguf.observing.importance import ImportanceObserver
from reap2gguf.observing.saliency import SaliencyObserver
from reap2gguf.observing.targets import layer_targets
from tests.families.nemotron import NANO, SUPER, TinyNemotronH
from tests.models.layouts import stored_of
from tests.models.oracles import (
    mean_kl,
    mtp_of_both,
    of_llama_cpp,
    of_transformers,
    pruned,
    tokens,
)
from tests.models.test_from_gguf import header_of
from tests.observing.sweeps import rows_of, run_sweep

LIGHTNING = replace(NANO, mtp=True)  # Nemotron-3.5: an MTP block without a latent
PREFIX = "nemotron_h_moe."


def model_of(tiny: TinyNemotronH = SUPER, keep_mtp: bool = True, **changes: Any) -> NemotronH:
    """With other keys in the config; `...` removes one."""
    config = {key: value for key, value in (tiny.config() | changes).items() if value is not ...}
    return NemotronH(config, "here/config.json", tiny.tensors().keys(), keep_mtp)


def header(model: NemotronH) -> dict[str, Any]:
    return {value.key.removeprefix(PREFIX): value.value for value in model.gguf_metadata()}


def test_header_values() -> None:
    found = header(model_of())
    assert found["block_count"] == 6
    assert found["nextn_predict_layers"] == 1
    assert found["feed_forward_length"] == [0, 40, 0, 0, 40, 40]
    assert found["attention.head_count_kv"] == [0, 0, 0, 2, 0, 2]
    assert (found["expert_shared_feed_forward_length"], found["moe_latent_size"]) == (56, 48)
    assert (found["ssm.inner_size"], found["ssm.time_step_rank"]) == (128, 8)
    assert (found["ssm.group_count"], found["ssm.state_size"], found["ssm.conv_kernel"]) == (
        2, 16, 4,
    )  # fmt: skip
    assert found["context_length"] == 2**20
    assert not [key for key in found if "freq" in key]
    nano = header(model_of(NANO))
    assert "moe_latent_size" not in nano
    assert "nextn_predict_layers" not in nano


def test_facts() -> None:
    facts = model_of().facts
    assert (facts.hidden_size, facts.expert_io_width, facts.gqa) == (64, 48, 0)
    assert facts.moe_layers == (1, 4, 5)
    first = model_of(replace(NANO, pattern="*EM")).facts
    assert (first.expert_io_width, first.gqa, first.moe_layers) == (64, 2, (1,))
    # a latent as wide as the hidden state has its matrices too
    as_wide = replace(NANO, latent=64)
    model_of(as_wide).check_tensors(stored_of(as_wide.tensors()))


def test_defaults_of_absent_keys() -> None:
    """transformers' own, which a small model cannot have by accident."""
    absent = dict.fromkeys(
        ("mamba_num_heads", "mamba_head_dim", "ssm_state_size", "n_groups", "conv_kernel",
         "head_dim", "num_key_value_heads", "layer_norm_epsilon", "norm_eps", "n_shared_experts",
         "norm_topk_prob", "n_group", "topk_group", "time_step_min", "time_step_limit",
         "use_conv_bias", "routed_scaling_factor", "num_nextn_predict_layers"),
        ...,
    )  # fmt: skip
    model = model_of(replace(NANO, n_heads=8), **absent)
    assert model.mamba.config() == {
        "mamba_num_heads": 128, "mamba_head_dim": 64, "ssm_state_size": 128, "n_groups": 8,
        "conv_kernel": 4,
    }  # fmt: skip
    assert (model.facts.head_dim, model.facts.n_kv_heads) == (128, 8)
    found = header(model)
    assert found["attention.layer_norm_epsilon"] == 1e-5
    assert found["attention.layer_norm_rms_epsilon"] == 1e-5
    assert (found["expert_shared_count"], found["expert_weights_norm"]) == (1, True)
    assert found["expert_weights_scale"] == 1.0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "nemotron"}, "model_type is 'nemotron', expected 'nemotron_h'"),
        ({"hybrid_override_pattern": ...}, "layers_block_type or hybrid_override_pattern is miss"),
        ({"hybrid_override_pattern": "MEX*E"}, "hybrid_override_pattern is 'MEX"),
        ({"hybrid_override_pattern": ""}, "hybrid_override_pattern is ''"),
        ({"hybrid_override_pattern": 5}, "hybrid_override_pattern is 5"),
        ({"hybrid_override_pattern": "ME-*E"}, "block 2 is an MLP, expected no such block"),
        ({"hybrid_override_pattern": "MEMME"}, "no block is full_attention"),
        ({"hybrid_override_pattern": "EE**E"}, "no block is linear_attention"),
        ({"hybrid_override_pattern": "MM**M"}, "no block is moe"),
        ({"num_hidden_layers": 4}, "num_hidden_layers is 4, but hybrid_override_pattern has 5"),
        ({"layers_block_type": ["mamba"] * 5}, "hybrid_override_pattern differ, of which"),
        ({"layers_block_type": ["mamba", 3]}, "layers_block_type is"),
        ({"layer_types": ["mamba"]}, "in place of layers_block_type"),
        ({"mamba_n_groups": 2}, "in place of n_groups"),
        ({"norm_eps": 1e-6}, "layer_norm_epsilon is 1e-05, but norm_eps is 1e-06"),
        ({"n_groups": 3}, "mamba_num_heads is 8, expected a multiple of n_groups, 3"),
        ({"conv_kernel": 1}, "conv_kernel is 1, expected an integer from 2"),
        ({"head_dim": 15}, "head_dim is 15, expected an even number"),
        ({"use_conv_bias": False}, "adds a bias after each convolution"),
        ({"tie_word_embeddings": True}, "does not tie the embeddings"),
        ({"time_step_min": 0.1}, "time_step_min is 0.1, expected at most 0.001"),
        ({"time_step_limit": [0.0, 0.1]}, "time_step_limit is .*, expected 0 and infinity"),
        ({"time_step_limit": [0.1, 1e30]}, "expected 0 and infinity"),
        ({"time_step_limit": 3}, "expected 0 and infinity"),
        ({"mtp_hybrid_override_pattern": "E*"}, "expected attention and then experts"),
        ({"mtp_layers_block_type": ["attention"]}, "expected attention and then experts"),
        ({"num_nextn_predict_layers": 2}, "has one MTP block"),
        ({"moe_latent_size": 0}, "moe_latent_size is 0"),
        ({"n_group": 3}, "8 experts, expected a multiple of the router's 3 groups"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UnsupportedModelError, match=said) as caught:
        model_of(**changes).check_tensors(stored_of(SUPER.tensors()))
    assert str(caught.value).startswith("here/config.json: ")


@pytest.mark.parametrize("limit", [float("inf"), 1e30, {"__float__": "Infinity"}])
def test_ways_to_say_that_time_steps_have_no_limit(limit: Any) -> None:
    assert model_of(time_step_limit=[0.0, limit]).facts == model_of().facts


def test_infinity_stays_in_the_pruned_config(tmp_path: Path) -> None:
    folder = pruned(NANO.write(tmp_path / "model"), tmp_path / "pruned", 4)
    assert "Infinity" in (folder / "config.json").read_text()
    assert of_transformers(folder, 512).isfinite().all()


def test_latents_that_are_stored_or_claimed_alone() -> None:
    with pytest.raises(UnknownTensorError, match="fc1_latent_proj"):
        model_of(moe_latent_size=None).check_tensors(stored_of(SUPER.tensors()))
    with pytest.raises(CheckpointError, match=r"fc1_latent_proj.*is missing"):
        model_of(NANO, moe_latent_size=48).check_tensors(stored_of(NANO.tensors()))


def test_the_count_of_mtp_blocks_follows_the_tensors() -> None:
    key = "num_nextn_predict_layers"
    lost = model_of(replace(SUPER, mtp=False), **{key: 1})
    assert not lost.facts.has_mtp
    assert "an MTP block that the checkpoint does not contain" in "".join(lost.caveats())
    assert lost.pruned_config(4)[key] == 0
    silent = model_of(**{key: ...})
    assert silent.facts.has_mtp
    assert silent.config_at_odds() is not None
    assert silent.pruned_config(4)[key] == 1
    dropped = model_of(keep_mtp=False)
    names = [name for name in SUPER.tensors() if name.startswith("mtp.")]
    assert {dropped.role(name) for name in names} == {Dropped()}
    assert (dropped.pruned_config(4)[key], header(dropped)["block_count"]) == (0, 5)


def test_a_second_mtp_block_is_unknown() -> None:
    tensors = SUPER.tensors() | {"mtp.layers.2.norm.weight": torch.ones(64)}
    with pytest.raises(UnknownTensorError, match=r"mtp\.layers\.2"):
        model_of().check_tensors(stored_of(tensors))


@pytest.mark.parametrize("tiny", [NANO, SUPER, replace(SUPER, fused=True)])
def test_logits_of_pruned_models(tiny: TinyNemotronH, tmp_path: Path) -> None:
    folder = pruned(tiny.write(tmp_path / "model"), tmp_path / "pruned", n_kept=4)
    theirs = of_transformers(folder, 512)
    assert theirs.std() > 1
    assert mean_kl(theirs, of_llama_cpp(folder, tmp_path, 512)) < 1e-6


def test_every_part_counts(tmp_path: Path) -> None:
    """What the comparisons of logits rest on."""
    folder = SUPER.write(tmp_path / "model")
    theirs: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    row = torch.tensor([tokens(512)])
    mamba, experts = theirs.model.layers[0].mixer, theirs.model.layers[1].mixer
    with torch.inference_mode():
        before = theirs(row).logits
        for part in (
            mamba.A_log, mamba.D, mamba.dt_bias, mamba.conv1d.bias, mamba.norm.weight,
            experts.gate.e_score_correction_bias, experts.fc1_latent_proj.weight,
        ):  # fmt: skip
            kept = part.clone()
            part.zero_()
            assert mean_kl(before[0], theirs(row).logits[0]) > 1e-4
            part.copy_(kept)


def test_the_bias_of_the_router_stays_exact(tmp_path: Path) -> None:
    """Router and bias are float32 in transformers, whatever the model's type."""
    with Checkpoint.open(SUPER.write(tmp_path / "model")) as checkpoint:
        model = describe(checkpoint)
        theirs: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="bfloat16")
        dtypes = {name: v.dtype for name, v in theirs.model.layers[1].state_dict().items()}
        targets = layer_targets(checkpoint, model, 1, torch.bfloat16, True, dtypes)
        assert targets["mixer.gate.e_score_correction_bias"].dtype is torch.float32
        assert targets["mixer.gate.weight"].dtype is torch.float32
        assert targets["mixer.experts.up_proj"].dtype is torch.bfloat16


@pytest.mark.parametrize("is_pruned", [False, True], ids=["whole", "pruned"])
@pytest.mark.parametrize("tiny", [SUPER, LIGHTNING], ids=["Super", "Lightning"])
def test_the_mtp_block_predicts_what_llama_cpps_does(
    tiny: TinyNemotronH, is_pruned: bool, tmp_path: Path
) -> None:
    folder = tiny.write(tmp_path / "model")
    if is_pruned:
        folder = pruned(folder, tmp_path / "pruned", 4)
    theirs, ours = mtp_of_both(folder, tmp_path, tiny.vocab)
    assert theirs.std() > 1
    assert mean_kl(theirs, ours) < 1e-6


def test_what_is_observed_of_the_mtp_block(tmp_path: Path) -> None:
    """Against transformers' own blocks, called by hand."""
    folder = SUPER.write(tmp_path / "model")
    rows = rows_of(40, 23)
    theirs: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    stored = {n.removeprefix("mtp.layers."): t.float() for n, t in SUPER.tensors().items()}
    attention, moe = (type(theirs.model.layers[3])(theirs.config, index) for index in (3, 4))
    attention.load_state_dict(part(stored, "0."), strict=False)
    state = part(stored, "1.")
    for name in ("up", "down"):
        each = [state.pop(f"mixer.experts.{e}.{name}_proj.weight") for e in range(8)]
        state[f"mixer.experts.{name}_proj"] = torch.stack(each)
    moe.load_state_dict(state, strict=False)
    kept: dict[str, list[torch.Tensor]] = {"up": [], "latent": []}
    routed: list[tuple[torch.Tensor, ...]] = []
    moe.mixer.shared_experts.register_forward_pre_hook(lambda _, given: kept["up"].append(given[0]))
    moe.mixer.experts.register_forward_pre_hook(lambda _, given: routed.append(given))
    moe.mixer.fc2_latent_proj.register_forward_pre_hook(
        lambda _, given: kept["latent"].append(given[0])
    )
    with torch.inference_mode():
        for row in map(torch.from_numpy, rows):
            hidden = theirs.model(row[None]).last_hidden_state[:, :-1]
            halves = (
                rms(theirs.model.embeddings(row[None, 1:]), stored["0.enorm.weight"]),
                rms(hidden, stored["0.hnorm.weight"]),
            )
            entering = torch.cat(halves, -1) @ stored["0.eh_proj.weight"].T
            moe(attention(entering, attention_mask=None))
    observer, _ = run_sweep(ImportanceObserver, folder, rows)
    for name, values in (("ffn_up_shexp", kept["up"]), ("ffn_latent_up", kept["latent"])):
        squares = torch.cat([one.reshape(-1, one.shape[-1]) for one in values]).square().sum(0)
        entry = observer.entries[f"blk.5.{name}.weight"]
        np.testing.assert_allclose(entry.sums[0], squares, rtol=1e-4)
    inputs, index, gates = (torch.cat(one) for one in zip(*routed, strict=True))
    saliency, _ = run_sweep(SaliencyObserver, folder, rows)
    seen = saliency.layers[5]
    for expert in range(8):
        token, place = torch.where(index == expert)
        up, down = (state[f"mixer.experts.{name}_proj"][expert] for name in ("up", "down"))
        norms = (torch.relu(inputs[token] @ up.T).square() @ down.T).norm(dim=-1)
        expected = float((norms * gates[token, place]).sum())
        assert seen.count[expert] == len(token)
        assert seen.reap_sum[expert] == pytest.approx(expected, rel=1e-4)


def part(stored: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {n.removeprefix(prefix): t for n, t in stored.items() if n.startswith(prefix)}


def rms(values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.rms_norm(values, values.shape[-1:], weight, 1e-5)


def foreign_config(tiny: TinyNemotronH = SUPER, **changes: Any) -> dict[str, Any]:
    """The config of a header with other values; None removes a key."""
    found = header_of(model_of(tiny), stored_of(tiny.tensors()))
    changed = {PREFIX + key.replace("__", "."): value for key, value in changes.items()}
    metadata = {k: v for k, v in (found.metadata | changed).items() if v is not None}
    return model_from_gguf(replace(found, metadata=metadata), BY_GGUF).config


def test_the_config_of_another_converters_header() -> None:
    config = foreign_config(attention__layer_norm_rms_epsilon=None, rope__freq_base=10000.0)
    assert config["layer_norm_epsilon"] == 1e-5
    assert config["layers_block_type"] == [
        "linear_attention", "moe", "linear_attention", "full_attention", "moe",
    ]  # fmt: skip
    assert (config["moe_latent_size"], config["num_nextn_predict_layers"]) == (48, 1)
    assert config["max_position_embeddings"] == 2**20
    assert foreign_config(NANO)["moe_latent_size"] is None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"attention__head_count_kv": [0, 0, 0, 2, 0, 1]}, "expected 0 or one number of heads"),
        ({"attention__head_count_kv": [0, 2, 0, 2, 0, 2]}, "0 where feed_forward_length is not"),
        ({"attention__head_count_kv": [0, 2]}, "has 2 values, expected 6"),
        ({"feed_forward_length": [0, 40, 0, 0, 0, 40]}, "'blk.4.ssm_in.weight' is missing"),
        ({"feed_forward_length": 40}, "expected a list of integers"),
        ({"attention__layer_norm_epsilon": None}, "layer_norm_epsilon is missing"),
        ({"attention__layer_norm_rms_epsilon": 1e-6}, "transformers has one for all norms"),
        ({"ssm__inner_size": 130}, "expected a multiple of nemotron_h_moe.ssm.time_step_rank, 8"),
        ({"ssm__group_count": 3}, "mamba_num_heads is 8, expected a multiple of n_groups, 3"),
        ({"moe_latent_size": 32}, "has the shape"),
        ({"moe_latent_size": None}, "has the shape|is not one of"),
        ({"expert_shared_feed_forward_length": None}, "feed_forward_length is missing"),
    ],
)
def test_a_header_that_cannot_be(changes: dict[str, Any], said: str) -> None:
    with pytest.raises((UnsupportedModelError, CheckpointError), match=said) as caught:
        foreign_config(**changes)
    assert "some.gguf" in str(caught.value)
