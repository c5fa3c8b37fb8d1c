"""Gemma-4: what only this family has."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader

from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.errors import ArtifactError, UnknownTensorError, UnsupportedModelError
from reap2gguf.gguf_files.reader import read_gguf_header
from reap2gguf.gguf_source.weights import GgufWeights
from reap2gguf.models.description import Carried, Router
from reap2gguf.models.from_gguf import model_from_gguf
from reap2gguf.models.gemma4 import Gemma4
from reap2gguf.models.table import BY_GGUF, describe
from reap2gguf.observing.decoder import StreamedDecoder
from tests.exporting.files import export_files, plain
from tests.families.gemma import GEMMA4, TEXT_ALONE, TinyGemma4
from tests.models.layouts import stored_of
from tests.models.oracles import (
    loaded,
    mean_kl,
    of_llama_cpp,
    of_transformers,
    planned,
    through_layers,
    tokens,
)
from tests.tiny import save_sharded


def model_of(tiny: TinyGemma4 = TEXT_ALONE, **changes: Any) -> Gemma4:
    config = {key: value for key, value in (tiny.config() | changes).items() if value is not ...}
    return Gemma4(config, "here/config.json", tiny.tensors().keys())


def header(model: Gemma4) -> dict[str, Any]:
    return {value.key.removeprefix("gemma4."): value.value for value in model.gguf_metadata()}


def test_header_values() -> None:
    found = header(model_of())
    assert found["attention.head_count_kv"] == [2, 2, 1]
    assert (found["attention.key_length"], found["attention.key_length_swa"]) == (32, 16)
    assert found["attention.sliding_window_pattern"] == [True, True, False]
    assert (found["rope.freq_base"], found["rope.freq_base_swa"]) == (1e6, 1e4)
    assert (found["feed_forward_length"], found["expert_feed_forward_length"]) == (104, 40)


@pytest.mark.parametrize(("cap", "written"), [(None, 0.0), (30.0, 30.0), (7, 7.0)])
def test_a_cap_of_the_logits(cap: float | None, written: float) -> None:
    """Without the key, llama.cpp draws logits below 30."""
    model = model_of(final_logit_softcapping=cap)
    assert model.logit_cap == cap
    assert header(model)["final_logit_softcapping"] == written


def test_the_layers_differ_and_both_spellings_say_the_same() -> None:
    one, other = model_of(), model_of(replace(TEXT_ALONE, resaved=True))
    assert one.gguf_metadata() == other.gguf_metadata()
    assert one.shapes() == other.shapes()
    assert one.config_values_of_layers() == other.config_values_of_layers()
    assert one.shapes()["model.layers.2.self_attn.q_proj.weight"] == (4 * 32, 64)
    assert one.shapes()["model.layers.1.self_attn.q_proj.weight"] == (4 * 16, 64)
    assert one.config_values_of_layers()[2] == {"head_dim": 32, "num_key_value_heads": 1}


def test_layers_with_full_attention_may_have_values_of_their_own() -> None:
    tiny = replace(TEXT_ALONE, shared_value=False)
    names = tiny.tensors().keys() - TEXT_ALONE.tensors().keys()
    assert names == {"model.layers.2.self_attn.v_proj.weight"}
    assert header(model_of(tiny))["attention.head_count_kv"] == [2, 2, 2]
    # as in transformers, the number for full layers counts only where they take keys as values
    model = model_of(tiny, num_global_key_value_heads=1)
    assert header(model)["attention.head_count_kv"] == [2, 2, 2]


def test_what_the_first_layer_has_decides_for_the_quantizer() -> None:
    assert model_of().facts.gqa == 2
    assert model_of(replace(TEXT_ALONE, layers="fsf")).facts.gqa == 4


def test_what_is_pruned_of_a_router() -> None:
    model = model_of()
    at = "model.layers.0.router."
    assert model.role(f"{at}proj.weight") == Router(0)
    assert model.role(f"{at}per_expert_scale") == Router(0)
    assert not isinstance(model.role(f"{at}scale"), Router)


def test_a_tower_is_carried_and_said() -> None:
    model = model_of(GEMMA4)
    towers = [name for name in model.names if "language_model" not in name]
    assert len(towers) > 10
    assert all(isinstance(model.role(name), Carried) for name in towers)
    assert [caveat for caveat in model.caveats() if "observed on text alone" in caveat]
    assert not [caveat for caveat in model.caveats() if "mmproj" in caveat]
    assert not model_of().caveats()
    assert not model_of().side_files(Path("here"), stored_of(TEXT_ALONE.tensors()))


def test_a_projector_that_is_not_written_is_said() -> None:
    config = GEMMA4.config()
    config["vision_config"]["use_clipped_linears"] = True
    model = Gemma4(config, "here/config.json", GEMMA4.tensors().keys())
    assert [caveat for caveat in model.caveats() if "no projector file (mmproj) is w" in caveat]
    assert not model.side_files(Path("here"), stored_of(GEMMA4.tensors()))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"enable_moe_block": ...}, "enable_moe_block is not true: the model has no experts"),
        ({"hidden_size_per_layer_input": 8}, "hidden_size_per_layer_input is 8, expected 0"),
        ({"hidden_size_per_layer_input": ...}, "hidden_size_per_layer_input is 256, expected 0"),
        ({"num_kv_shared_layers": 1}, "no layer takes keys and values of another"),
        ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention is 'all'"),
        ({"num_experts_per_tok": 3, "top_k_experts": ...}, "top_k_experts is missing"),
        ({"num_global_key_value_heads": 3}, "num_attention_heads is 4, expected a multiple of the"),
        ({"final_logit_softcapping": 0}, "final_logit_softcapping is 0, expected a number from"),
        ({"model_type": "gemma4"}, "the config has no text_config; expected gemma4 with one"),
        ({"hidden_activation": "silu"}, "llama.cpp's gemma4 computes GeGLU"),
        ({"num_attention_heads": 3}, "num_attention_heads is 3, expected a multiple of"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UnsupportedModelError, match=said) as caught:
        model_of(**changes).check_tensors(stored_of(TEXT_ALONE.tensors()))
    assert str(caught.value).startswith("here/config.json: ")


def test_experts_that_are_one_tensor_each_are_refused() -> None:
    """transformers reads fused ones alone."""
    tensors = TEXT_ALONE.tensors()
    fused = tensors.pop("model.layers.0.experts.down_proj")
    for expert, matrix in enumerate(fused):
        tensors[f"model.layers.0.experts.{expert}.down_proj.weight"] = matrix
    model = Gemma4(TEXT_ALONE.config(), "here/config.json", tensors.keys())
    with pytest.raises(UnknownTensorError, match="down_proj"):
        model.check_tensors(stored_of(tensors))


def test_the_pruned_config_keeps_its_form() -> None:
    config = model_of(GEMMA4).pruned_config(5)
    assert config["text_config"]["num_experts"] == 5
    assert config["text_config"]["top_k_experts"] == 2
    assert config["vision_config"] == GEMMA4.config()["vision_config"]


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0, 0.0])
def test_the_part_of_a_head_that_is_rotated(share: float, tmp_path: Path) -> None:
    """A tensor that is made: with it, llama.cpp computes what transformers does."""
    tiny = replace(TEXT_ALONE, share=share)
    folder = tiny.write(tmp_path / "model")
    vocab = planned(folder).facts.vocab_size
    path = export_files(folder, tmp_path, [plain("F32")])["F32"]
    (found,) = [t.data for t in GGUFReader(path).tensors if t.name == "rope_freqs.weight"]
    turned = int(16 * share)
    np.testing.assert_array_equal(found, np.float32([1] * turned + [1e30] * (16 - turned)))
    assert mean_kl(of_transformers(folder, vocab), of_llama_cpp(folder, tmp_path, vocab)) < 1e-6


def test_a_file_with_another_rotation_is_not_computed(tmp_path: Path) -> None:
    """Its header does not say how much of a head is rotated, so the tensor is compared."""
    folder = replace(TEXT_ALONE, share=0.5).write(tmp_path / "model")
    header = read_gguf_header(export_files(folder, tmp_path, [plain("F32")])["F32"])
    found = model_from_gguf(header, BY_GGUF)
    with pytest.raises(
        ArtifactError, match=r"rope_freqs.weight' has 1 as value 4, expected 1e\+30"
    ):
        GgufWeights(header, found.model, found.template)


def test_a_gguf_file_has_the_weights_of_its_checkpoint(tmp_path: Path) -> None:
    folder = TEXT_ALONE.write(tmp_path / "model")
    header = read_gguf_header(export_files(folder, tmp_path, [plain("F32")])["F32"])
    found = model_from_gguf(header, BY_GGUF)
    weights = GgufWeights(header, found.model, found.template)
    for name, tensor in TEXT_ALONE.tensors().items():
        values = weights.read_float32(name)
        np.testing.assert_array_equal(values, tensor.float().numpy().reshape(values.shape))


def test_a_window_changes_what_is_computed(tmp_path: Path) -> None:
    """What the comparison with llama.cpp rests on: the rows are longer than the window."""
    short = replace(TEXT_ALONE, window=4).write(tmp_path / "short")
    usual = TEXT_ALONE.write(tmp_path / "usual")
    assert mean_kl(of_transformers(short, 512), of_transformers(usual, 512)) > 1e-5


@pytest.mark.parametrize("tiny", [GEMMA4, replace(TEXT_ALONE, layers="fsf")], ids=str)
def test_streamed_layers_are_transformers(tiny: TinyGemma4, tmp_path: Path) -> None:
    """Layer by layer, in float32: scaled embeddings, both rotations, windows, and the norm."""
    folder = tiny.write(tmp_path / "model")
    row = torch.tensor([tokens(512)])
    theirs = loaded(folder).get_decoder()
    with torch.inference_mode():
        expected = theirs(row, use_cache=False).last_hidden_state
    with Checkpoint.open(folder) as checkpoint:
        model = describe(checkpoint)
        decoder = StreamedDecoder(checkpoint, model, torch.float32, torch.device("cpu"))
        hidden = through_layers(decoder, model.facts.n_layers, row)
        decoder.load_norm()
        found = decoder.final_norm(hidden)
        decoder.close()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_layer_that_scales_nothing_is_needed(tmp_path: Path) -> None:
    tensors = TEXT_ALONE.tensors()
    folder = TEXT_ALONE.write(tmp_path / "model")
    before = of_transformers(folder, 512)
    tensors["model.layers.1.layer_scalar"] += 0.5
    save_sharded(tensors, folder, 1)
    (folder / "config.json").write_text(json.dumps(TEXT_ALONE.config()))
    after = of_transformers(folder, 512)
    assert mean_kl(before, after) > 1e-4
    assert mean_kl(after, of_llama_cpp(folder, tmp_path, 512)) < 1e-6
