"""MiniMax-M2: what only this family has; `test_fp8.py` has its checkpoints in FP8."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.errors import CheckpointError, UnknownTensorError, UnsupportedModelError
from reap2gguf.models.description import Dropped
from reap2gguf.models.from_gguf import model_from_gguf
from reap2gguf.models.minimax_m2 import MiniMaxM2
from reap2gguf.models.table import BY_GGUF, describe
from reap2gguf.models.transformers_config import check_with_transformers
from reap2gguf.observing.targets import layer_targets
from tests.families.minimax import TINY, TinyMiniMaxM2
from tests.models.layouts import stored_of
from tests.models.oracles import loaded, pruned, tokens
from tests.models.test_from_gguf import header_of


def model_of(tiny: TinyMiniMaxM2 = TINY, **changes: Any) -> MiniMaxM2:
    config = {key: value for key, value in (tiny.config() | changes).items() if value is not ...}
    return MiniMaxM2(config, "here/config.json", tiny.tensors().keys())


def header(model: MiniMaxM2) -> dict[str, Any]:
    return {one.key.removeprefix("minimax-m2."): one.value for one in model.gguf_metadata()}


def test_header_values() -> None:
    found = header(model_of())
    assert (found["rope.dimension_count"], found["expert_gating_func"]) == (16, 2)
    assert found["feed_forward_length"] == found["expert_feed_forward_length"] == 96
    assert header(model_of(scoring_func=...))["expert_gating_func"] == 2


def test_absent_keys_have_transformers_values() -> None:
    absent = dict.fromkeys(
        ("rope_theta", "rms_norm_eps", "num_key_value_heads", "head_dim", "rotary_dim"), ...
    )
    model = model_of(num_attention_heads=16, **absent)
    check_with_transformers(model)
    assert (model.facts.n_kv_heads, model.facts.head_dim, model.rope.theta) == (8, 128, 5e6)
    assert header(model)["rope.dimension_count"] == 128


@pytest.mark.parametrize(
    "changes",
    [
        {"rotary_dim": 16},
        {"rotary_dim": ..., "partial_rotary_factor": 0.5},
        {"rotary_dim": 16, "partial_rotary_factor": 0.5},
        {"rotary_dim": ..., "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        {"rotary_dim": 16, "rope_parameters": {"rope_type": "default"}},
    ],
    ids=str,
)
def test_spellings_of_the_rotated_share(changes: dict[str, Any]) -> None:
    model = model_of(**changes)
    check_with_transformers(model)
    assert header(model)["rope.dimension_count"] == 16


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "mixtral"}, "model_type is 'mixtral', expected 'minimax_m2'"),
        ({"rotary_dim": 8, "partial_rotary_factor": 0.5}, "rotary_dim is 8, but .* are 16"),
        ({"rotary_dim": 33}, "rotary_dim is 33, expected an integer from 1 to 32"),
        ({"rotary_dim": 15}, "15 of the 32 dimensions of a head are rotated"),
        ({"attn_type_list": [1, 0]}, r"attn_type_list is \[1, 0\], expected 1 for each layer"),
        ({"sliding_window": 512}, "sliding_window is 512.*minimax-m2 has full attention"),
        ({"scoring_func": "softmax"}, "the router's scores are sigmoids"),
        ({"use_routing_bias": False}, "a bias is added to every router's scores"),
        ({"norm_topk_prob": False}, "weights are normalised"),
        ({"routed_scaling_factor": 2.5}, "weights are not scaled"),
        ({"n_group": 8}, "no groups of experts"),
        ({"use_qk_norm": False}, "queries and keys have norms"),
        ({"qk_norm_type": "per_head"}, "a norm is of all queries of a token"),
        ({"shared_intermediate_size": 64}, "there is no shared expert"),
        ({"layernorm_mlp_beta": 3.5}, "what a layer adds is not scaled"),
        ({"num_experts": 4}, "num_local_experts is 8, but num_experts is 4|num_experts is 4"),
        ({"num_mtp_modules": -1}, "num_mtp_modules is -1, expected an integer from 0"),
    ],
    ids=str,
)
def test_what_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UnsupportedModelError, match=said) as caught:
        model_of(**changes).check_tensors(stored_of(TINY.tensors()))
    assert str(caught.value).startswith("here/config.json: ")


def test_a_head_of_its_own_is_needed() -> None:
    tiny = replace(TINY, tied=True)
    with pytest.raises(UnsupportedModelError, match="minimax-m2 needs one of its own"):
        model_of(tiny)


# multi-token prediction


def test_modules_that_the_config_alone_names() -> None:
    """As in every published checkpoint."""
    model = model_of()
    assert any("that the checkpoint does not contain" in one for one in model.caveats())
    config = model.pruned_config(4)
    assert (config["use_mtp"], config["num_mtp_modules"], config["num_local_experts"]) == (
        False, 0, 4,
    )  # fmt: skip
    assert not model_of(use_mtp=..., num_mtp_modules=...).caveats()
    assert "use_mtp" not in model_of(use_mtp=...).pruned_config(4)


def test_stored_modules_are_left_out(tmp_path: Path) -> None:
    tiny = replace(TINY, n_modules=2)
    model = model_of(tiny)
    model.check_tensors(stored_of(tiny.tensors()))
    names = [n for n in tiny.tensors() if n.startswith(("model.layers.2.", "model.layers.3."))]
    assert len(names) > 40
    assert all(model.role(name) == Dropped() for name in names)
    assert any("are left out" in caveat for caveat in model.caveats())
    ours = pruned(tiny.write(tmp_path / "model"), tmp_path / "pruned")
    with Checkpoint.open(ours) as checkpoint:
        assert checkpoint.tensors.keys() == TINY.tensors().keys()


def test_layers_that_the_config_does_not_count_are_no_modules() -> None:
    """A config with fewer layers than are stored, and three modules: nothing is dropped."""
    tiny = replace(TINY, n_layers=3)
    config = tiny.config() | {"num_hidden_layers": 2}
    model = MiniMaxM2(config, "here/config.json", tiny.tensors().keys())
    with pytest.raises(UnknownTensorError, match=r"layers\.2"):
        model.check_tensors(stored_of(tiny.tensors()))


# the router's bias


def test_the_bias_changes_which_experts_are_chosen(tmp_path: Path) -> None:
    """What the comparisons of logits rest on."""
    model = loaded(TINY.write(tmp_path / "model"))
    row = torch.tensor([tokens(TINY.vocab)])
    with torch.inference_mode():
        before = model(row).logits
        for layer in model.model.layers:
            layer.mlp.e_score_correction_bias.zero_()
        assert not torch.allclose(model(row).logits, before, atol=0.1)


def test_the_bias_is_computed_in_float32(tmp_path: Path) -> None:
    """transformers' buffer has the type of the model, which would round it."""
    name = "block_sparse_moe.e_score_correction_bias"
    with Checkpoint.open(TINY.write(tmp_path / "model")) as checkpoint:
        model = describe(checkpoint)
        module = {"mlp.e_score_correction_bias": torch.bfloat16}
        found = layer_targets(checkpoint, model, 1, torch.bfloat16, True, module)
        assert found["mlp.e_score_correction_bias"].dtype is torch.float32
        assert found["mlp.gate.weight"].dtype is torch.bfloat16
        assert model.is_computed_in_f32(1, name)
        assert not model.is_computed_in_f32(1, "block_sparse_moe.gate.weight")


# headers of other programs


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"expert_gating_func": 1}, "this router makes sigmoids"),
        ({"feed_forward_length": 64}, "all layers are made of experts"),
        ({"rope.dimension_count": 64}, "rope.dimension_count is 64, expected an integer"),
        ({"expert_count": 4}, "has 8 experts, expected 4"),
    ],
    ids=str,
)
def test_a_header_that_cannot_be(changes: dict[str, Any], said: str) -> None:
    found = header_of(model_of(), stored_of(TINY.tensors()))
    metadata = found.metadata | {f"minimax-m2.{key}": value for key, value in changes.items()}
    with pytest.raises((UnsupportedModelError, CheckpointError), match=said):
        model_from_gguf(replace(found, metadata=metadata), BY_GGUF)


@pytest.mark.parametrize("rotary", [0.25, 0.75, None])
def test_a_header_says_what_is_rotated(rotary: float | None) -> None:
    tiny = replace(TINY, rotary=rotary)
    found = model_from_gguf(header_of(model_of(tiny), stored_of(tiny.tensors())), BY_GGUF)
    check_with_transformers(found.model)
    assert header(found.model)["rope.dimension_count"] == int(32 * (rotary or 1))  # type: ignore[arg-type]
