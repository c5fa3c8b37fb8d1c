"""gpt-oss: what only this family has, and its experts in MXFP4 from source to GGUF."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Mxfp4Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.errors import UnknownTensorError, UnsupportedModelError
from reap2gguf.models.from_gguf import model_from_gguf
from reap2gguf.models.gpt_oss import GptOss
from reap2gguf.models.qwen3_moe import Qwen3Moe
from reap2gguf.models.table import BY_GGUF, describe
from reap2gguf.models.transformers_config import check_with_transformers, transformers_config
from reap2gguf.progress import Silent
from reap2gguf.pruning.view import PrunedView
from reap2gguf.pruning.write import write_pruned
from tests.exporting.files import export_files, plain
from tests.families.gpt_oss import THETA, TINY, YARN
from tests.models.converted import contents
from tests.models.drawn import ABSENT
from tests.models.layouts import stored_of
from tests.models.oracles import SMALL_VOCAB, mean_kl, tokens
from tests.models.test_from_gguf import header_of
from tests.quantized import as_mxfp4
from tests.tiny import ONE_THREAD, TinyQwen3Moe

PACKED = as_mxfp4(TINY)
# of config.json of openai/gpt-oss-20b
PUBLISHED = {
    "beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096,
    "rope_type": "yarn", "truncate": False,
}  # fmt: skip
KEPT = (0, 3, 4, 6)
FULL, SLIDING = "full_attention", "sliding_attention"


def model_of(tiny: Any = TINY, **changes: Any) -> GptOss:
    config = {k: v for k, v in {**tiny.config(), **changes}.items() if v is not ABSENT}
    return GptOss(config, "here/config.json", tiny.tensors().keys())


def values_of(model: GptOss) -> dict[str, Any]:
    return {one.key.removeprefix("gpt-oss."): one.value for one in model.gguf_metadata()}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"swiglu_alpha": 1.7}, "swiglu_alpha is 1.7, expected 1.702: llama.cpp's gpt-oss"),
        ({"swiglu_limit": 10.0}, "swiglu_limit is 10.0, expected 7.0: llama.cpp's gpt-oss"),
        ({"attention_bias": False}, "attention_bias is False"),
        ({"layer_types": [FULL, SLIDING, FULL]}, "window in every second layer, from the first"),
        ({"sliding_window": 0}, "sliding_window is 0"),
        ({"sliding_window": None}, "sliding_window is null"),
        ({"rope_scaling": ABSENT}, "rope_parameters is missing, expected the settings"),
        ({"rope_scaling": {**YARN, "beta_fast": 16.0}}, "beta_fast is 16.0, expected 32"),
        ({"rope_scaling": {**YARN, "truncate": None}}, "truncate is None, expected true or false"),
        ({"rope_scaling": {**YARN, "partial_rotary_factor": 0.5}}, "rotates whole heads"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"model_type": "gpt_oss_2"}, "model_type is 'gpt_oss_2', expected 'gpt_oss'"),
        ({"num_local_experts": ABSENT}, "num_local_experts or num_experts is missing"),
    ],
    ids=str,
)
def test_what_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UnsupportedModelError, match=said):
        values_of(model_of(**changes))


def test_absent_keys_have_the_values_of_transformers() -> None:
    keys = ("layer_types", "sliding_window", "swiglu_limit", "attention_bias", "head_dim")
    model = model_of(**dict.fromkeys(keys, ABSENT))
    check_with_transformers(model)
    assert values_of(model)["attention.sliding_window"] == 128
    assert model.facts.head_dim == 64


@pytest.mark.parametrize("n_layers", [1, 2, 5])
def test_any_number_of_layers(n_layers: int) -> None:
    model = model_of(replace(TINY, n_layers=n_layers))
    check_with_transformers(model)
    assert model.facts.moe_layers == tuple(range(n_layers))


def test_the_head_is_its_own() -> None:
    for changes in ({"tie_word_embeddings": True}, {}):
        tiny = replace(TINY, tied=not changes)
        with pytest.raises(UnsupportedModelError, match="tie_word_embeddings"):
            model_of(tiny, **changes)


def test_the_fractions_of_yarn_are_told() -> None:
    """As published: the frequencies of transformers are others than those of llama.cpp."""
    model = model_of(rope_scaling=PUBLISHED, rope_theta=150000)
    check_with_transformers(model)
    (said,) = [one for one in model.caveats() if "truncate is false, as published" in one]
    assert "llama.cpp rounds them" in said
    found = []
    for truncate in (False, True):
        scaling = {**PUBLISHED, "truncate": truncate}
        config = {**TINY.config(), "rope_scaling": scaling, "rope_theta": 150000, "head_dim": 64}
        found.append(ROPE_INIT_FUNCTIONS["yarn"](transformers_config(config), "cpu")[0])
    differ = ~torch.isclose(found[0], found[1], rtol=1e-3)
    assert 0 < int(differ.sum()) < 12, "a few of the 32 pairs of a head"
    rounded = model_of(rope_scaling={**YARN, "truncate": True}, rope_theta=THETA)
    assert not any("truncate" in one for one in rounded.caveats())


def test_fractions_are_refused_in_other_families() -> None:
    config = {**TinyQwen3Moe().config(), "rope_scaling": PUBLISHED}
    with pytest.raises(UnsupportedModelError, match="truncate is False, expected true"):
        Qwen3Moe(config, "here/config.json").gguf_metadata()


def test_experts_of_one_tensor_each_are_refused() -> None:
    """As some re-saved checkpoints have them: transformers' module has no such layout."""
    model, stored = model_of(), stored_of(TINY.tensors())
    name = "model.layers.0.mlp.experts.0.gate_proj.weight"
    stored[name] = replace(stored["model.layers.0.mlp.router.weight"], name=name)
    with pytest.raises(UnknownTensorError, match=r"experts.0.gate_proj.weight"):
        model.check_tensors(stored)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("attention.sliding_window_pattern", 3, "a window in every second layer"),
        ("rope.freq_base_swa", 10_000.0, "all layers rotate alike"),
        ("expert_gating_func", 2, "this router makes a softmax"),
    ],
)
def test_gguf_files_of_another_kind(key: str, value: Any, said: str) -> None:
    header = header_of(model_of(), stored_of(TINY.tensors()))
    header.metadata[f"gpt-oss.{key}"] = value
    with pytest.raises(UnsupportedModelError, match=said):
        model_from_gguf(header, BY_GGUF)


def blocks_of(path: Path, name: str) -> np.ndarray:
    """The blocks of a tensor: (E, rows, blocks, 17)."""
    tensor = next(t for t in gguf.GGUFReader(path).tensors if t.name == name)
    assert tensor.tensor_type.name == "MXFP4"
    columns, rows, experts = (int(size) for size in tensor.shape)
    return np.asarray(tensor.data).reshape(experts, rows, columns // 32, 17)


def codes_of(blocks: np.ndarray, is_gguf: bool) -> np.ndarray:
    """The 32 codes of four bits of each block, in the order of the values."""
    low, high = blocks & 15, blocks >> 4
    if is_gguf:
        return np.concatenate((low, high), axis=-1)
    return np.stack((low, high), axis=-1).reshape(*blocks.shape[:-1], 32)


@pytest.mark.parametrize("recipe", ["Q4_K_M", "BF16", "MXFP4_MOE"])
def test_blocks_are_those_of_the_source(recipe: str, tmp_path: Path) -> None:
    """Nibbles and exponents of the kept experts, in the safetensors and in the GGUF file."""
    folder, target = PACKED.write(tmp_path / "model"), tmp_path / "pruned"
    target.mkdir()
    stored = load_file(folder / "model.safetensors")
    with Checkpoint.open(folder) as checkpoint:
        model = describe(checkpoint)
        view = PrunedView(checkpoint, model, dict.fromkeys(model.facts.moe_layers, KEPT))
        write_pruned(view, target, Silent())
    pruned = load_file(target / "model.safetensors")
    kept = list(KEPT)
    path = export_files(target, tmp_path, [plain(recipe)])[recipe]
    for layer in range(TINY.n_layers):
        base = f"model.layers.{layer}.mlp.experts."
        for part in ("gate_up_proj", "down_proj"):
            for suffix in ("blocks", "scales", "bias"):
                name = f"{base}{part}_{suffix}"
                assert torch.equal(pruned[name], stored[name][kept])
        for projection, rows in (("gate", slice(0, None, 2)), ("up", slice(1, None, 2))):
            found = blocks_of(path, f"blk.{layer}.ffn_{projection}_exps.weight")
            expect_blocks(found, stored, f"{base}gate_up_proj", rows)
        found = blocks_of(path, f"blk.{layer}.ffn_down_exps.weight")
        expect_blocks(found, stored, f"{base}down_proj", slice(None))


def expect_blocks(
    found: np.ndarray, stored: dict[str, torch.Tensor], name: str, rows: slice
) -> None:
    kept = list(KEPT)
    scales = stored[f"{name}_scales"][kept, rows].numpy()
    blocks = stored[f"{name}_blocks"][kept, rows].numpy()
    assert np.array_equal(found[..., 0], scales)
    assert np.array_equal(codes_of(found[..., 1:], True), codes_of(blocks, False))


def test_keys_are_those_of_bf16(tmp_path: Path) -> None:
    """Which are llama.cpp's converter's, as are the bytes (test_converted_quantized.py)."""
    found = {}
    for name, tiny in (("packed", PACKED), ("plain", TINY)):
        folder = tiny.write(tmp_path / name)
        found[name] = contents(export_files(folder, tmp_path / name, [plain("BF16")])["BF16"])
    assert found["packed"]["keys"] == found["plain"]["keys"]
    types = [
        {key: one[:2] for key, one in found[name]["tensors"].items() if "_exps.weight" not in key}
        for name in ("packed", "plain")
    ]
    assert types[0] == types[1]


def test_the_pruned_folder_says_that_it_is_quantized(tmp_path: Path) -> None:
    folder, target = PACKED.write(tmp_path / "model"), tmp_path / "pruned"
    target.mkdir()
    with Checkpoint.open(folder) as checkpoint:
        model = describe(checkpoint)
        view = PrunedView(checkpoint, model, dict.fromkeys(model.facts.moe_layers, KEPT))
        write_pruned(view, target, Silent())
        caveats = checkpoint.caveats
    with Checkpoint.open(target) as checkpoint:
        assert checkpoint.stored.config["quantization_config"] == {"quant_method": "mxfp4"}
        assert checkpoint.stored.config["num_local_experts"] == len(KEPT)
        assert describe(checkpoint).facts.n_experts == len(KEPT)
    assert any(re.search("MXFP4 in a GGUF file too has its blocks bit for bit", c) for c in caveats)


def test_dequantized_experts_are_of_no_blocks(tmp_path: Path) -> None:
    """As a BF16 checkpoint's: then recipes give them what they give others."""
    with Checkpoint.open(PACKED.write(tmp_path / "model")) as checkpoint:
        made = describe(checkpoint).gguf_tensors(checkpoint.tensors)
        assert sum(one.block_type is not None for one in made) == 3 * TINY.n_layers
        plain_one = checkpoint.dequantized()
        made = describe(plain_one).gguf_tensors(plain_one.tensors)
        assert all(one.block_type is None for one in made)


def test_transformers_loads_the_pruned_folder(tmp_path: Path) -> None:
    """And has the values that are decoded here, so the logits are those of the GGUF's blocks."""
    folder, target = PACKED.write(tmp_path / "model"), tmp_path / "pruned"
    target.mkdir()
    with Checkpoint.open(folder) as checkpoint:
        model = describe(checkpoint)
        view = PrunedView(checkpoint, model, dict.fromkeys(model.facts.moe_layers, KEPT))
        write_pruned(view, target, Silent())
    theirs, said = AutoModelForCausalLM.from_pretrained(
        target,
        quantization_config=Mxfp4Config(dequantize=True),
        dtype=torch.float32,
        output_loading_info=True,
    )
    assert not any(said.values())
    state = theirs.get_decoder().state_dict()
    with Checkpoint.open(target) as checkpoint:
        for name in ("gate_up_proj", "down_proj"):
            path = f"layers.1.mlp.experts.{name}"
            expected = checkpoint.read_float32(f"model.{path}")
            np.testing.assert_array_equal(state[path].float().numpy(), expected)
    row = tokens(SMALL_VOCAB)
    with torch.inference_mode():
        logits = theirs.float()(torch.tensor([row])).logits[0]
    path = export_files(target, tmp_path, [plain("F32")])["F32"]
    llama = llama_cpp.Llama(
        str(path), n_ctx=64, n_batch=64, logits_all=True, verbose=False, **ONE_THREAD
    )
    llama.eval(row)
    found = torch.tensor(np.array(llama.scores[: len(row)]))
    llama.close()
    # llama.cpp rounds what it multiplies blocks with to 8 bits
    assert mean_kl(logits, found) < 1e-3
