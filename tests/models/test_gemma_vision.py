"""What is written of the vision tower of Gemma-4, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType

from reap2gguf.checkpoint.config import ConfigReader
from reap2gguf.errors import CheckpointError, UnknownTensorError
from reap2gguf.models.gemma_vision import TOWER, gemma_projector, why_not_written
from tests.families.gemma import GEMMA4, IMAGES, TinyGemma4
from tests.models.layouts import stored_of

NAMES = frozenset(GEMMA4.tensors())


def config(**vision: Any) -> ConfigReader:
    whole = GEMMA4.config()
    whole["vision_config"] |= vision
    return ConfigReader(whole, "here/config.json")


def projector(folder: Path, tiny: TinyGemma4 = GEMMA4, **changes: Any) -> Any:
    (folder / "preprocessor_config.json").write_text(json.dumps(IMAGES))
    stored = stored_of(tiny.tensors()) | changes
    stored = {name: one for name, one in stored.items() if one is not None}
    standardize = tiny.standardize
    return gemma_projector(config(standardize=standardize), folder, stored, tiny.hidden)


@pytest.mark.parametrize(
    ("vision", "said"),
    [
        ({}, None),
        ({"use_clipped_linears": True}, "use_clipped_linears is not False"),
        ({"hidden_activation": "silu"}, "hidden_activation is not 'gelu_pytorch_tanh'"),
        ({"attention_bias": True}, "attention_bias is not False"),
        ({"rope_parameters": {"rope_theta": 5.0}}, "rope_theta is not 100"),
        ({"rope_parameters": {"rope_theta": 100.0, "rope_type": "axial"}}, None),
        ({"num_key_value_heads": 1}, "heads share keys"),
        ({"head_dim": 8}, "as wide as its hidden states"),
    ],
)
def test_towers_that_llama_cpp_computes(vision: dict[str, Any], said: str | None) -> None:
    found = why_not_written(config(**vision), NAMES)
    assert found is None if said is None else said in str(found)


def test_a_tower_for_sound_is_not_written() -> None:
    assert "sound" in str(why_not_written(config(), NAMES | {"model.audio_tower.a.weight"}))


def test_a_key_for_another_pooling(tmp_path: Path) -> None:
    def keys(**vision: Any) -> dict[str, Any]:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(IMAGES))
        stored = stored_of(GEMMA4.tensors())
        side = gemma_projector(config(**vision), tmp_path, stored, GEMMA4.hidden)
        return {value.key: value.value for value in side.values}

    assert "clip.vision.projector.scale_factor" not in keys()
    assert keys(pooling_kernel_size=2)["clip.vision.projector.scale_factor"] == 2
    assert keys()["clip.vision.image_mean"] == [0.0, 0.0, 0.0]


def test_types_and_what_is_standardized(tmp_path: Path) -> None:
    side = projector(tmp_path, replace(GEMMA4, standardize=True))
    types = side.tensor_types()
    assert types["v.std_bias"] == types["v.position_embd.weight"] == GGMLQuantizationType.F32
    assert types["v.patch_embd.weight"] == GGMLQuantizationType.F16
    assert "v.std_bias" not in projector(tmp_path).tensor_types()


def test_what_is_missing_unknown_or_of_another_shape(tmp_path: Path) -> None:
    first = f"{TOWER}patch_embedder.input_proj.weight"
    other = stored_of(GEMMA4.tensors())["model.embed_vision.embedding_projection.weight"]
    with pytest.raises(CheckpointError, match="of the vision tower is missing"):
        projector(tmp_path, **{first: None})
    with pytest.raises(UnknownTensorError, match="has no place in the projector file"):
        projector(tmp_path, **{f"{TOWER}new.weight": other})
    with pytest.raises(CheckpointError, match=r"expected \[32, 48\], as vision_config says"):
        projector(tmp_path, **{first: other})


def test_patches_are_put_back(tmp_path: Path) -> None:
    for tensor in projector(tmp_path).tensors:
        if tensor.transform is None:
            continue
        shape = stored_of(GEMMA4.tensors())[tensor.slabs[0].stored].shape
        values = np.random.default_rng(0).normal(size=shape).astype(np.float32)
        found, again = tensor.transform(values), np.full_like(values, np.nan)
        assert found.shape == tensor.shape
        tensor.transform.put_back(found, again)
        np.testing.assert_array_equal(again, values)
