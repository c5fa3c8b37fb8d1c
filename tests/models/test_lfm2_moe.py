"""LFM2-MoE: what only this family has."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.errors import CheckpointError, UnsupportedModelError
from reap2gguf.models.from_gguf import model_from_gguf
from reap2gguf.models.lfm2_moe import Lfm2Moe
from reap2gguf.models.table import BY_GGUF, describe
from reap2gguf.observing.decoder import StreamedDecoder
from reap2gguf.observing.importance import ImportanceObserver
from reap2gguf.observing.targets import layer_targets
from reap2gguf.quantizing.file_types import MIXTURES
from tests.exporting.files import export_files as export
from tests.exporting.files import llama_quantize, mean_squares, plain, random_imatrix, stored
from tests.families.lfm2 import TINY, TinyLfm2Moe
from tests.models.layouts import stored_of
from tests.models.oracles import mean_kl, of_llama_cpp, of_transformers, pruned
from tests.models.test_from_gguf import header_of
from tests.observing.sweeps import rows_of, run_sweep


def model_of(tiny: TinyLfm2Moe = TINY, **changes: Any) -> Lfm2Moe:
    config = {key: value for key, value in (tiny.config() | changes).items() if value is not ...}
    return Lfm2Moe(config, "here/config.json", tiny.tensors().keys())


def header(model: Lfm2Moe) -> dict[str, Any]:
    return {
        value.key.removeprefix("lfm2moe."): value.value
        for value in model.gguf_metadata()
        if value.key.startswith("lfm2moe.")
    }


def test_header_values() -> None:
    found = header(model_of())
    assert found["attention.head_count_kv"] == [0, 2, 0, 0]
    assert (found["leading_dense_block_count"], found["expert_gating_func"]) == (1, 2)
    assert (found["shortconv.l_cache"], found["vocab_size"]) == (3, 512)
    assert (found["feed_forward_length"], found["expert_feed_forward_length"]) == (160, 96)
    assert found["rope.freq_base"] == 100_000.0
    assert found["attention.layer_norm_rms_epsilon"] == 1e-5
    assert not [key for key in found if "length" in key and key.startswith("attention.")]


def test_defaults_of_absent_keys() -> None:
    absent = dict.fromkeys(
        ("rope_theta", "norm_eps", "num_dense_layers", "conv_L_cache", "conv_bias",
         "use_expert_bias", "norm_topk_prob", "routed_scaling_factor", "tie_word_embeddings"),
        ...,
    )  # fmt: skip
    model = model_of(replace(TINY, n_dense=2), **absent)
    found = header(model)
    assert found["rope.freq_base"] == 1e6
    assert found["attention.layer_norm_rms_epsilon"] == 1e-5
    assert (found["leading_dense_block_count"], found["shortconv.l_cache"]) == (2, 3)
    assert model.facts.tied_embeddings


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "lfm2"}, "model_type is 'lfm2', expected 'lfm2_moe'"),
        ({"layer_types": ...}, "layer_types is None, expected 4 of conv and full_attention"),
        ({"layer_types": ["conv", "full_attention"]}, "expected 4 of conv"),
        ({"layer_types": ["conv"] * 4}, "no layer of layer_types is full_attention"),
        ({"layer_types": ["full_attention"] * 4}, "no layer of layer_types is conv"),
        ({"layer_types": ["conv", "full_attention", "conv", "sliding_attention"]}, "expected 4 of"),
        ({"head_dim": 32}, "4 heads of size 32, expected head_dim times num_attention_heads"),
        ({"num_attention_heads": 6}, "6 heads of size 10, expected"),
        ({"num_dense_layers": 4}, "every layer is dense"),
        ({"num_dense_layers": 9}, "every layer is dense"),
        ({"conv_L_cache": 1}, "conv_L_cache is 1, expected an integer from 2"),
        ({"intermediate_size": ...}, "intermediate_size is missing"),
        ({"tie_embedding": False}, "tie_embedding is False, but tie_word_embeddings is True"),
        ({"tie_embedding": None}, "tie_embedding is null"),
        ({"rms_norm_eps": 1e-6}, "norm_eps is 1e-05, but rms_norm_eps is 1e-06"),
        ({"partial_rotary_factor": 0.5}, "lfm2moe rotates whole heads"),
        ({"routed_scaling_factor": 2.5}, "lfm2moe does not scale the experts' weights"),
        ({"use_expert_bias": False}, "adds a bias to every router's scores"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UnsupportedModelError, match=said) as caught:
        model_of(**changes).check_tensors(stored_of(TINY.tensors()))
    assert str(caught.value).startswith("here/config.json: ")


@pytest.mark.parametrize("alias", ["tie_embedding", "tie_word_embeddings", None])
@pytest.mark.parametrize("tied", [True, False])
def test_keys_that_tie_the_embeddings(alias: str | None, tied: bool, tmp_path: Path) -> None:
    """As transformers reads each; also of the pruned config, and llama.cpp's logits."""
    tiny = replace(TINY, tied=tied, tie_key=alias)
    folder = tiny.write(tmp_path / "model")
    with Checkpoint.open(folder) as checkpoint:
        model = describe(checkpoint)
    # without a key, transformers ties the two where no other head is stored
    assert model.facts.tied_embeddings is tied
    config = model.pruned_config(4)
    expected = {alias} if alias else ({"tie_word_embeddings"} if not tied else set())
    assert {key: config[key] for key in config if key.startswith("tie_")} == dict.fromkeys(
        expected, tied
    )
    ours = pruned(folder, tmp_path / "pruned")
    vocab = model.facts.vocab_size
    theirs = of_transformers(folder, vocab)
    assert mean_kl(theirs, of_transformers(ours, vocab)) < 1e-9
    assert mean_kl(theirs, of_llama_cpp(ours, tmp_path, vocab)) < 1e-6


@pytest.mark.parametrize("layers", ["cfcc", "fcf", "ccffc"])
def test_logits_of_pruned_models(layers: str, tmp_path: Path) -> None:
    folder = replace(TINY, layers=layers).write(tmp_path / "model")
    ours = pruned(folder, tmp_path / "pruned", n_kept=4)
    theirs = of_transformers(ours, 512)
    assert theirs.std() > 1
    assert mean_kl(theirs, of_llama_cpp(ours, tmp_path, 512)) < 1e-6


def test_biases_change_which_experts_are_chosen(tmp_path: Path) -> None:
    """What the comparisons of logits rest on."""
    folder = TINY.write(tmp_path / "model")
    theirs: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, 500, 64))[None]
    with torch.inference_mode():
        before = theirs(tokens).logits
        for layer in theirs.model.layers[1:]:
            layer.feed_forward.expert_bias.zero_()
        assert not torch.allclose(theirs(tokens).logits, before, atol=0.1)


def test_the_bias_of_the_router_stays_exact(tmp_path: Path) -> None:
    """It is float32 in every checkpoint; in bfloat16 it would choose other experts."""
    with Checkpoint.open(TINY.write(tmp_path / "model")) as checkpoint:
        model = describe(checkpoint)
        theirs: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="bfloat16")
        dtypes = {name: v.dtype for name, v in theirs.model.layers[1].state_dict().items()}
        targets = layer_targets(checkpoint, model, 1, torch.bfloat16, True, dtypes)
        assert targets["feed_forward.expert_bias"].dtype is torch.float32
        assert targets["feed_forward.gate.weight"].dtype is torch.bfloat16


HEADS_KEY, FIRST_DENSE = "lfm2moe.attention.head_count_kv", "lfm2moe.leading_dense_block_count"


def foreign_config(**changes: Any) -> dict[str, Any]:
    """The config of a header with other values; None removes a key."""
    stored = stored_of(TINY.tensors())
    found = header_of(model_of(), stored)
    metadata = {k: v for k, v in (found.metadata | changes).items() if v is not None}
    return model_from_gguf(replace(found, metadata=metadata), BY_GGUF).config


def test_a_header_with_heads_per_layer() -> None:
    config = foreign_config(**{"lfm2moe.attention.key_length": 16})
    assert config["layer_types"] == TINY.config()["layer_types"]
    assert config["num_key_value_heads"] == 2
    expected = model_of().facts
    assert Lfm2Moe(config, "some.gguf").facts == expected


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        (HEADS_KEY, [0, 2, 0, 1], r"is \[0, 2, 0, 1\], expected 0 or one number of heads"),
        (HEADS_KEY, [0, 0, 0, 0], "expected 0 or one number of heads"),
        (HEADS_KEY, [0, 2], "has 2 values, expected 4"),
        (HEADS_KEY, 2, "expected a list of integers"),
        (HEADS_KEY, None, "has 0 values, expected 4"),
        (HEADS_KEY, [0, 0, 2, 0], "'blk.1.shortconv.conv.weight' is missing"),
        (FIRST_DENSE, None, "'blk.0.ffn_gate_inp.weight' is missing"),
        (FIRST_DENSE, 5, "leading_dense_block_count is 5, expected an integer from 0 to 4"),
        ("lfm2moe.expert_gating_func", 1, "this router makes sigmoids"),
        ("lfm2moe.shortconv.l_cache", None, "l_cache is missing"),
        ("lfm2moe.shortconv.l_cache", 4, "has the shape .*, expected"),
    ],
)
def test_a_header_that_cannot_be(key: str, value: Any, said: str) -> None:
    with pytest.raises((UnsupportedModelError, CheckpointError), match=said) as caught:
        foreign_config(**{key: value})
    assert "some.gguf" in str(caught.value)


def test_layers_and_last_norm_are_computed_as_in_transformers(tmp_path: Path) -> None:
    """Convolutions and attention get arguments of their own; the norm is where it is called so."""
    folder = TINY.write(tmp_path / "model")
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, 500, (3, 21)))
    theirs: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with Checkpoint.open(folder) as checkpoint, torch.inference_mode():
        model, cpu = describe(checkpoint), torch.device("cpu")
        decoder = StreamedDecoder(checkpoint, model, torch.float32, cpu)
        try:
            decoder.load_embedding()
            hidden = decoder.embed(tokens)
            for layer in range(model.facts.n_layers):
                decoder.load_layer(layer)
                hidden = decoder.run_layer(layer, hidden)
            decoder.load_norm()
            found = decoder.final_norm(hidden)
        finally:
            decoder.close()
        expected = theirs.model(tokens).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_padding_changes_nothing(tmp_path: Path) -> None:
    """Rows of several lengths are computed in one batch, and convolutions see no padding."""
    folder = TINY.write(tmp_path / "model")
    rows = rows_of(32, 19, 5)
    together, _ = run_sweep(ImportanceObserver, folder, rows)
    apart = [run_sweep(ImportanceObserver, folder, [row])[0].entries for row in rows]
    for name, entry in together.entries.items():
        np.testing.assert_array_equal(entry.counts, sum(one[name].counts for one in apart))
        sums = sum(one[name].sums for one in apart)
        np.testing.assert_allclose(entry.sums, sums, rtol=2e-5, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(("layers", "n_experts"), [("cfcf", 3), ("fccf", 3), ("cfcf", 8)])
def test_types_are_llama_cpp_s(layers: str, n_experts: int, tmp_path: Path) -> None:
    """Its quantizer counts heads in the first layer, which has none where it is a convolution."""
    shape = {"hidden": 256, "width": 256, "dense_width": 256, "n_heads": 8, "n_kv_heads": 2}
    tiny = replace(TINY, layers=layers, n_experts=n_experts, **shape)  # type: ignore[arg-type]
    folder = tiny.write(tmp_path / "model")
    with Checkpoint.open(folder) as checkpoint:
        imatrix = random_imatrix(describe(checkpoint).gguf_tensors(checkpoint.tensors))
    names = ["Q2_K", "IQ3_XS", "IQ4_XS", "Q4_K_M"]
    paths = export(folder, tmp_path, [plain("BF16"), *map(plain, names)], imatrix)
    squares = mean_squares(imatrix)
    for name in names:
        target = tmp_path / "theirs.gguf"
        assert llama_quantize(paths["BF16"], target, MIXTURES[name].file_type, squares)
        theirs, ours = stored(target), stored(paths[name])
        assert {key: kind for key, (kind, _) in ours.items()} == {
            key: kind for key, (kind, _) in theirs.items()
        }
        assert ours == theirs
