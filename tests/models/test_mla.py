"""Latent attention: how kv_b_proj is split, and what llama.cpp computes of YaRN."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.checkpoint.config import ConfigReader
from reap2gguf.errors import CheckpointError, UnsupportedModelError
from reap2gguf.gguf_files.reader import read_gguf_header
from reap2gguf.gguf_source.weights import GgufWeights
from reap2gguf.models.deepseek2 import Glm4MoeLite
from reap2gguf.models.from_gguf import model_from_gguf
from reap2gguf.models.mla import LatentRope, read_heads, read_latent_rope
from reap2gguf.models.table import BY_GGUF, describe
from tests.exporting.files import export_files, plain
from tests.families.mla import FLASH
from tests.models.drawn import Drawn
from tests.models.layouts import stored_of
from tests.models.oracles import SMALL_VOCAB
from tests.models.test_any_config import Different, check
from tests.models.test_contract import values_of
from tests.models.test_from_gguf import expect_same_model, header_of

KV_B = "model.layers.1.self_attn.kv_b_proj.weight"
SMALL = replace(FLASH, vocab=SMALL_VOCAB, n_layers=2, mtp=False)


def test_keys_and_values_are_split_head_by_head(tmp_path: Path) -> None:
    """As transformers' attention views the same matrix; keys are transposed."""
    with Checkpoint.open(FLASH.write(tmp_path / "model")) as checkpoint:
        tensors = describe(checkpoint).gguf_tensors(checkpoint.tensors)
        made = {t.name: t for t in tensors if ".attn_k_b." in t.name or ".attn_v_b." in t.name}
        assert len(made) == 2 * (FLASH.n_layers + 1)
        keys, values = (
            torch.from_numpy(values_of(checkpoint, made[f"blk.1.attn_{part}_b.weight"]))
            for part in "kv"
        )
    assert keys.shape == (FLASH.n_heads, FLASH.rank, FLASH.nope)
    assert values.shape == (FLASH.n_heads, FLASH.value, FLASH.rank)
    latents = torch.randn(7, FLASH.rank, generator=torch.Generator().manual_seed(0))
    expanded = latents @ FLASH.tensors()[KV_B].float().T
    theirs = expanded.view(7, FLASH.n_heads, FLASH.nope + FLASH.value)
    torch.testing.assert_close(
        torch.einsum("tr,hrn->thn", latents, keys), theirs[..., : FLASH.nope]
    )
    torch.testing.assert_close(
        torch.einsum("tr,hvr->thv", latents, values), theirs[..., FLASH.nope :]
    )


def test_the_weights_of_a_file_are_the_checkpoints(tmp_path: Path) -> None:
    """Both halves put back, read as a whole and in parts."""
    folder = FLASH.write(tmp_path / "model")
    path = export_files(folder, tmp_path, [plain("F32")])["F32"]
    header = read_gguf_header(path)
    found = model_from_gguf(header, BY_GGUF)
    weights = GgufWeights(header, found.model, found.template)
    for name, tensor in FLASH.tensors().items():
        assert torch.equal(torch.from_numpy(weights.read_float32(name)), tensor.float()), name
    part = np.zeros(4 * 100, dtype=np.uint8)
    weights.read_bytes(KV_B, 4 * 333, part)
    assert torch.equal(
        torch.from_numpy(part.view(np.float32)), FLASH.tensors()[KV_B].float().flatten()[333:433]
    )


@pytest.mark.parametrize("shape", [(176, 33), (177, 32), (32, 176)])
def test_a_matrix_of_another_shape_is_refused(shape: tuple[int, int]) -> None:
    tensors = FLASH.tensors()
    model = Glm4MoeLite(FLASH.config(), "here", tensors.keys())
    stored = stored_of(tensors | {KV_B: torch.empty(shape)})
    with pytest.raises(CheckpointError, match=rf"kv_b_proj.*\[{shape[0]}, {shape[1]}\]"):
        model.gguf_tensors(stored)
    del stored[KV_B]
    with pytest.raises(CheckpointError, match=r"kv_b_proj.*missing"):
        model.gguf_tensors(stored)


def heads_of(**changes: Any) -> Any:
    config = {k: v for k, v in (FLASH.config() | changes).items() if v is not ...}
    return read_heads(ConfigReader(config, "here/config.json"))


def test_sizes_of_heads() -> None:
    heads = heads_of()
    assert (heads.n_heads, heads.nope, heads.rotated, heads.value) == (4, 24, 16, 20)
    assert (heads.rank, heads.query_rank, heads.query) == (32, 40, 40)
    assert heads_of(q_lora_rank=None).query_rank is None
    assert heads_of(head_dim=16, qk_head_dim=40) == heads


@pytest.mark.parametrize(
    "changes",
    [
        {"head_dim": 40},  # transformers would rotate so much
        {"qk_head_dim": 48},
        {"num_key_value_heads": 2},
        {"kv_lora_rank": 0},
        {"q_lora_rank": 0},
        {"v_head_dim": "20"},
        {"qk_nope_head_dim": ...},
    ],
    ids=str,
)
def test_heads_that_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModelError, match=next(iter(changes))):
        heads_of(**changes)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}


def rope_of(**settings: Any) -> LatentRope:
    config = {"max_position_embeddings": 512, "rope_parameters": {"rope_theta": 1e4, **settings}}
    return read_latent_rope(ConfigReader(config, "here/config.json"), "llama.cpp's deepseek2")


EQUAL = {"mscale": 0.7, "mscale_all_dim": 0.7}
NONE = {"attention_factor": 1.0}


@pytest.mark.parametrize("scale", [EQUAL, {"mscale": 1.0, "mscale_all_dim": 1.0}, NONE], ids=str)
def test_yarn_is_the_same_in_llama_cpp(scale: dict[str, float]) -> None:
    text = (("rope_parameters", {"rope_theta": 1000.0, **YARN, **scale}),)
    assert check(Drawn(SMALL, "as configured", text, ())) == "the same"


def test_a_wrong_scale_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the test above rests on."""
    right = LatentRope.metadata

    def without(self: LatentRope) -> list[Any]:
        return [entry for entry in right(self) if "yarn_log" not in entry[0]]

    monkeypatch.setattr(LatentRope, "metadata", without)
    text = (("rope_parameters", {"rope_theta": 1000.0, **YARN, "mscale": 4, "mscale_all_dim": 4}),)
    with pytest.raises(Different):
        check(Drawn(SMALL, "as configured", text, ()))


def test_keys_of_yarn() -> None:
    """A tenth of `mscale_all_dim`, and no factor of the attention but where it is cancelled."""
    found = {key: value for key, value, _ in rope_of(**YARN, **EQUAL).metadata()}
    assert found["{arch}.rope.scaling.yarn_log_multiplier"] == pytest.approx(0.07)
    assert "{arch}.rope.scaling.attn_factor" not in found
    found = {key: value for key, value, _ in rope_of(**YARN, **NONE).metadata()}
    assert "{arch}.rope.scaling.yarn_log_multiplier" not in found
    assert found["{arch}.rope.scaling.attn_factor"] == pytest.approx(1 / (0.1 * np.log(4) + 1))
    # of no effect where nothing is scaled
    found = {key: value for key, value, _ in rope_of(rope_type="default", **EQUAL).metadata()}
    assert found == {"{arch}.rope.freq_base": 1e4}


@pytest.mark.parametrize("scale", [EQUAL, NONE, {"mscale": 0.707, "mscale_all_dim": 0.707}])
def test_yarn_in_a_header(scale: dict[str, float]) -> None:
    tensors = FLASH.tensors()
    config = FLASH.config() | {"rope_parameters": {"rope_theta": 1e4, **YARN, **scale}}
    model = Glm4MoeLite(config, "here", tensors.keys())
    found = expect_same_model(model, header_of(model, stored_of(tensors))).config
    ours, theirs = found["rope_parameters"], config["rope_parameters"]
    assert ours.get("mscale_all_dim") == theirs.get("mscale_all_dim")
    assert ours["attention_factor"] == 1


@pytest.mark.parametrize(
    "settings",
    [
        {"rope_type": "linear", "factor": 2.0},
        YARN,  # rotated values would be scaled
        {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5},
        {**YARN, "mscale": 1.0},
        {**YARN, "factor": 0.5},
        {**YARN, **EQUAL, "attention_factor": 1.2},
        {**YARN, **EQUAL, "mscale_all_dim": "1"},
        {**YARN, **NONE, "mscale_all_dim": -1.0},
        {"rope_type": "default", "partial_rotary_factor": 0.5},
    ],
    ids=str,
)
def test_rotary_embeddings_that_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModelError, match=r"here/config\.json"):
        rope_of(**settings)
