"""ERNIE-4.5 with experts: what only this family has."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import reap2gguf
from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.errors import CheckpointError, UnknownTensorError, UnsupportedModelError
from reap2gguf.gguf_files.reader import read_gguf_header
from reap2gguf.models.description import Carried, Dropped, Router
from reap2gguf.models.ernie4_5_moe import Ernie45Moe
from reap2gguf.models.from_gguf import model_from_gguf
from reap2gguf.models.table import BY_GGUF, describe
from reap2gguf.models.transformers_config import check_with_transformers
from reap2gguf.observing.targets import layer_targets
from reap2gguf.options import ComputeOptions
from reap2gguf.pruning.view import PrunedView
from tests.exporting.files import export_files, plain
from tests.families.ernie import LAYOUTS, TINY, TinyErnie45Moe
from tests.models.layouts import stored_of
from tests.models.oracles import loaded, mean_kl, of_llama_cpp, of_transformers, pruned, tokens
from tests.models.test_from_gguf import header_of
from tests.tokenizer.small_spm import VOCAB_SIZE, piece_model, spm_tokenizer, write_spm

WITH_MTP = replace(TINY, mtp=True)
BIAS = "model.layers.1.mlp.moe_statics.e_score_correction_bias"


def model_of(tiny: TinyErnie45Moe = TINY, keep_mtp: bool = True, **changes: Any) -> Ernie45Moe:
    config = {key: value for key, value in (tiny.config() | changes).items() if value is not ...}
    return Ernie45Moe(config, "here/config.json", tiny.tensors().keys(), keep_mtp)


def header(model: Ernie45Moe) -> dict[str, Any]:
    return {one.key.removeprefix("ernie4_5-moe."): one.value for one in model.gguf_metadata()}


def test_header_values() -> None:
    found = header(model_of())
    assert (found["interleave_moe_layer_step"], found["leading_dense_block_count"]) == (1, 1)
    assert (found["expert_shared_count"], found["expert_shared_feed_forward_length"]) == (2, 192)
    assert (found["feed_forward_length"], found["expert_feed_forward_length"]) == (384, 96)
    assert "expert_gating_func" not in found
    # llama.cpp's converter would write 384 / 2, which is right for the published 21B alone
    assert header(model_of(intermediate_size=100))["expert_shared_feed_forward_length"] == 192
    large = header(model_of(LAYOUTS["Ernie4_5_MoeForCausalLM"]["300B-A47B"]))
    assert (large["expert_shared_count"], large["leading_dense_block_count"]) == (0, 3)
    assert "expert_shared_feed_forward_length" not in large


def test_absent_keys_have_transformers_values() -> None:
    absent = dict.fromkeys(
        ("rope_theta", "rms_norm_eps", "num_key_value_heads", "moe_num_shared_experts", "use_bias",
         "moe_layer_start_index", "moe_layer_end_index", "moe_layer_interval",
         "tie_word_embeddings"),
        ...,
    )  # fmt: skip
    model = model_of(**absent)
    check_with_transformers(model)
    assert (model.facts.n_kv_heads, model.n_shared, model.rope.theta) == (4, 2, 5e5)
    assert model.facts.moe_layers == (1, 2)
    assert model.facts.tied_embeddings
    assert header(model)["attention.layer_norm_rms_epsilon"] == 1e-5


@pytest.mark.parametrize("last", [2, -1, 40, ...])
def test_the_last_layer_with_experts(last: Any) -> None:
    model = model_of(moe_layer_end_index=last)
    check_with_transformers(model)
    assert model.facts.moe_layers == (1, 2)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "ernie4_5"}, "model_type is 'ernie4_5', expected 'ernie4_5_moe'"),
        ({"moe_layer_end_index": 1}, "moe_layer_end_index is 1, expected 2, the last layer"),
        ({"moe_layer_end_index": -2}, "moe_layer_end_index is -2, expected an integer from 0"),
        ({"moe_layer_end_index": [2, 2]}, r"moe_layer_end_index is \[2, 2\], expected an integer"),
        ({"moe_layer_interval": 2}, "loads experts for all layers after the dense ones"),
        ({"moe_layer_start_index": 3}, "every layer is dense"),
        ({"moe_layer_start_index": [1, 1]}, "moe_layer_start_index is .*expected an integer"),
        ({"moe_num_experts": [8, 8]}, "moe_num_experts is .*expected an integer"),
        ({"moe_k": None}, "moe_k is null"),
        ({"moe_k": ...}, "moe_k is missing"),
        ({"num_experts_per_tok": 3}, "moe_k is 2, but num_experts_per_tok is 3"),
        ({"moe_norm_min": 0.5}, "moe_norm_min is 0.5, expected a number from 0 to 6"),
        ({"use_bias": True}, "ernie4_5-moe has no biases"),
        ({"moe_gate_act": "sigmoid"}, "takes a softmax of the router's logits"),
        ({"moe_use_aux_free": False}, "adds a bias to every router's scores"),
        ({"norm_topk_prob": False}, "normalises the chosen experts' weights"),
        ({"routed_scaling_factor": 2.0}, "does not scale the experts' weights"),
        ({"moe_group_experts": True}, "has no groups of experts"),
        ({"compression_ratio": 0.5}, "does not compress positions"),
        ({"sliding_window": 64}, "has full attention"),
        ({"partial_rotary_factor": 0.5}, "rotates whole heads"),
    ],
    ids=str,
)
def test_what_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UnsupportedModelError, match=said) as caught:
        model_of(**changes).check_tensors(stored_of(TINY.tensors()))
    assert str(caught.value).startswith("here/config.json: ")


@pytest.mark.parametrize("says", [True, None])
@pytest.mark.parametrize("tied", [True, False])
def test_keys_that_tie_the_embeddings(says: bool | None, tied: bool, tmp_path: Path) -> None:
    """transformers ties them by default; the stored tensors decide."""
    folder = replace(TINY, tied=tied).write(tmp_path / "model")
    if says is None:
        config = json.loads((folder / "config.json").read_text())
        del config["tie_word_embeddings"]
        (folder / "config.json").write_text(json.dumps(config))
    with Checkpoint.open(folder) as checkpoint:
        model = describe(checkpoint)
    assert model.facts.tied_embeddings is tied
    check_with_transformers(model)
    assert model.pruned_config(4).get("tie_word_embeddings", True) is tied
    ours = pruned(folder, tmp_path / "pruned", n_kept=4)
    theirs = of_transformers(ours, TINY.vocab)
    assert mean_kl(theirs, of_llama_cpp(ours, tmp_path, TINY.vocab)) < 1e-6


# the router's bias


def test_the_bias_is_pruned_along_its_last_axis(tmp_path: Path) -> None:
    with Checkpoint.open(TINY.write(tmp_path / "model")) as checkpoint:
        model = describe(checkpoint)
        assert model.role(BIAS) == Router(1, 1)
        view = PrunedView(checkpoint, model, dict.fromkeys(model.facts.moe_layers, (1, 4, 6)))
        assert view.tensors[BIAS].shape == (1, 3)
        expected = TINY.tensors()[BIAS][:, [1, 4, 6]].numpy()
        np.testing.assert_array_equal(view.read_float32(BIAS), expected)


@pytest.mark.parametrize("shape", [(8,), (8, 1), (1, 7), (2, 8)])
def test_a_bias_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    stored = stored_of(TINY.tensors() | {BIAS: torch.zeros(shape)})
    with pytest.raises(CheckpointError, match=r"shape \[.*8 experts on its last axis"):
        model_of().check_tensors(stored)


def test_the_bias_changes_which_experts_are_chosen(tmp_path: Path) -> None:
    """What the comparisons of logits rest on."""
    model = loaded(TINY.write(tmp_path / "model"))
    row = torch.tensor([tokens(TINY.vocab)])
    with torch.inference_mode():
        before = model(row).logits
        for layer in model.model.layers[1:]:
            layer.mlp.gate.moe_statics.e_score_correction_bias.zero_()
        assert not torch.allclose(model(row).logits, before, atol=0.1)


def test_router_and_bias_stay_float32(tmp_path: Path) -> None:
    with Checkpoint.open(TINY.write(tmp_path / "model")) as checkpoint:
        model = describe(checkpoint)
        theirs: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="bfloat16")
        dtypes = {name: v.dtype for name, v in theirs.model.layers[1].state_dict().items()}
        targets = layer_targets(checkpoint, model, 1, torch.bfloat16, True, dtypes)
        bias = targets["mlp.gate.moe_statics.e_score_correction_bias"]
        assert (bias.dtype, bias.shape) == (torch.float32, (1, 8))
        assert targets["mlp.gate.weight"].dtype is torch.float32
        assert targets["self_attn.q_proj.weight"].dtype is torch.bfloat16


# multi-token prediction


def test_a_module_stays_in_the_safetensors(tmp_path: Path) -> None:
    names = [name for name in WITH_MTP.tensors() if name.startswith("model.mtp_")]
    assert len(names) == 12
    model = model_of(WITH_MTP)
    assert {model.role(name) for name in names} == {Carried()}
    assert any("model.mtp_*) is copied as it is" in caveat for caveat in model.caveats())
    assert model.pruned_config(4)["num_nextn_predict_layers"] == 1
    assert model_of().pruned_config(4)["num_nextn_predict_layers"] == 0
    source = WITH_MTP.write(tmp_path / "model")
    ours = pruned(source, tmp_path / "pruned", n_kept=4)
    with Checkpoint.open(ours) as checkpoint, Checkpoint.open(source) as whole:
        for name in names:
            assert checkpoint.read(name).tobytes() == whole.read(name).tobytes()
        made = {one.name for one in describe(checkpoint).gguf_tensors(checkpoint.tensors)}
    assert not any("mtp" in name or "blk.3" in name for name in made)
    theirs = of_transformers(ours, TINY.vocab)
    assert mean_kl(theirs, of_llama_cpp(ours, tmp_path, TINY.vocab)) < 1e-6


def test_a_module_can_be_left_out() -> None:
    model = model_of(WITH_MTP, keep_mtp=False)
    assert model.role("model.mtp_emb_norm.0.weight") == Dropped()
    assert model.pruned_config(4)["num_nextn_predict_layers"] == 0
    assert not any("mtp_" in caveat for caveat in model.caveats())


def test_a_module_with_experts_is_refused() -> None:
    name = "model.mtp_block.0.mlp.experts.0.up_proj.weight"
    stored = stored_of(WITH_MTP.tensors() | {name: torch.ones(96, 64)})
    with pytest.raises(UnknownTensorError, match=r"mtp_block.*has experts.*--mtp drop"):
        model_of(WITH_MTP).check_tensors(stored)
    model_of(WITH_MTP, keep_mtp=False).check_tensors(stored)


# headers of other programs


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"interleave_moe_layer_step": 2}, "llama.cpp loads no other step"),
        ({"expert_shared_feed_forward_length": 100}, "a multiple of an expert's width, 96"),
        ({"leading_dense_block_count": 4}, "leading_dense_block_count is 4, expected an integer"),
        ({"expert_gating_func": 2}, "this router makes a softmax"),
    ],
    ids=str,
)
def test_a_header_that_cannot_be(changes: dict[str, Any], said: str) -> None:
    found = header_of(model_of(), stored_of(TINY.tensors()))
    metadata = found.metadata | {f"ernie4_5-moe.{key}": value for key, value in changes.items()}
    with pytest.raises(UnsupportedModelError, match=said):
        model_from_gguf(replace(found, metadata=metadata), BY_GGUF)


# SentencePiece


def with_sentencepiece(folder: Path) -> Path:
    """A model whose tokenizer puts no space before a text, as the published ones."""
    tiny = replace(TINY, vocab=VOCAB_SIZE)
    config = tiny.config() | {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    tiny.write(folder)
    description = spm_tokenizer()
    del description["normalizer"]["normalizers"][0]
    files = write_spm(folder.parent / "spm", description, piece_model(adds_space=False))
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json"):
        shutil.copy(files / name, folder / name)
    for name in ("chat_template.jinja", "generation_config.json"):
        (folder / name).unlink(missing_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_sentencepiece_tokenizer(tmp_path: Path) -> None:
    """Its header, and a comparison of the checkpoint with its file on a text."""
    folder = with_sentencepiece(tmp_path / "model")
    path = export_files(folder, tmp_path, [plain("F32")])["F32"]
    keys = read_gguf_header(path).metadata
    assert keys["tokenizer.ggml.model"] == "llama"
    assert keys["tokenizer.ggml.add_space_prefix"] is False
    (tmp_path / "text.txt").write_text("the river rose in the night and the bridge was gone " * 20)
    found = reap2gguf.compare(
        folder,
        path,
        reference=folder,
        text=str(tmp_path / "text.txt"),
        chunk=32,
        chunks=2,
        compute=ComputeOptions(device="cpu", threads=1),
    )
    assert not any(one.not_evaluated for one in found.models)
    divergence = found.divergence("F32.gguf")
    assert divergence is not None
    assert abs(divergence.mean.value) < 1e-6
