"""The projector file of a vision tower."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader
from safetensors.torch import load_file, save_file
from transformers.image_processing_base import ImageProcessingMixin

from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.errors import CheckpointError, UnknownTensorError, UnsupportedModelError
from reap2gguf.exporting.header_facts import HeaderNames
from reap2gguf.exporting.model_files import export_side
from reap2gguf.models.description import Carried, SideFile
from reap2gguf.models.table import describe
from reap2gguf.progress import Silent
from reap2gguf.pruning.write import companion_files
from reap2gguf.verifying.gguf_file import ExpectedGguf, check_side_file
from tests.tiny import TinyQwen35Moe

BASE = TinyQwen35Moe(n_experts=4, vocab=64)
TOWER = "model.visual."


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return BASE.write(tmp_path / "model")


def side_of(folder: Path) -> SideFile:
    with Checkpoint.open(folder) as checkpoint:
        (side,) = describe(checkpoint).side_files(folder, checkpoint.tensors)
        return side


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["vision_config"] |= changes
    path.write_text(json.dumps(config))


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def test_a_model_without_a_tower_has_no_projector(tmp_path: Path) -> None:
    for number, tiny in enumerate((replace(BASE, vision=False), replace(BASE, nested=False))):
        folder = tiny.write(tmp_path / str(number))
        with Checkpoint.open(folder) as checkpoint:
            model = describe(checkpoint)
            assert model.side_files(folder, checkpoint.tensors) == ()
            assert model.caveats() == ()


def test_every_tensor_of_the_tower_is_carried_and_in_the_projector(folder: Path) -> None:
    with Checkpoint.open(folder) as checkpoint:
        model = describe(checkpoint)
        tower = {name for name in checkpoint.tensors if name.startswith(TOWER)}
        assert {model.role(name) for name in tower} == {Carried()}
        (side,) = model.side_files(folder, checkpoint.tensors)
    used = [slab.stored for tensor in side.tensors for slab in tensor.slabs]
    assert set(used) == tower
    twice = {name for name in used if used.count(name) > 1}
    assert twice == {TOWER + "patch_embed.proj.weight"}  # a frame each
    assert len({tensor.name for tensor in side.tensors}) == len(side.tensors)


def test_names_and_types(folder: Path) -> None:
    side = side_of(folder)
    kinds = side.tensor_types()
    both = ("weight", "bias")
    expected = {"v.patch_embd.weight", "v.patch_embd.weight.1", "v.patch_embd.bias"}
    expected |= {"v.position_embd.weight"}
    expected |= {f"{name}.{part}" for name in ("v.post_ln", "mm.0", "mm.2") for part in both}
    for block in range(2):
        for name in ("attn_qkv", "attn_out", "ffn_up", "ffn_down", "ln1", "ln2"):
            expected |= {f"v.blk.{block}.{name}.{part}" for part in both}
    assert set(kinds) == expected
    half = {name for name, kind in kinds.items() if kind is GGMLQuantizationType.F16}
    assert half == {
        t.name for t in side.tensors if len(t.shape) > 1 and t.name != "v.position_embd.weight"
    }
    assert {kinds[name] for name in kinds.keys() - half} == {GGMLQuantizationType.F32}


def test_the_header(folder: Path) -> None:
    side = side_of(folder)
    assert (side.prefix, side.general_type, side.arch) == ("mmproj", "mmproj", "clip")
    values = {value.key: value.value for value in side.values}
    assert len(values) == len(side.values)
    assert values == {
        "clip.has_vision_encoder": True,
        "clip.projector_type": "qwen3vl_merger",
        "clip.vision.projection_dim": 64,
        "clip.vision.image_size": 64,  # four by four patches of 16
        "clip.vision.patch_size": 16,
        "clip.vision.embedding_length": 32,
        "clip.vision.feed_forward_length": 64,
        "clip.vision.block_count": 2,
        "clip.vision.attention.head_count": 2,
        "clip.vision.image_mean": [0.5, 0.5, 0.5],
        "clip.vision.image_std": [0.5, 0.5, 0.5],
        "clip.use_gelu": True,
        "clip.vision.spatial_merge_size": 2,
        "clip.vision.attention.layer_norm_epsilon": 1e-6,
        "clip.vision.is_deepstack_layers": [False, False],
    }


def test_the_file_holds_the_towers_values(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "mmproj.gguf"
    with Checkpoint.open(folder) as checkpoint:
        side = side_of(folder)
        names = HeaderNames("tiny")
        model = describe(checkpoint)
        export_side(checkpoint, model, names, path, side, 2, Silent())
        expected = ExpectedGguf(side.tensor_types(), names=names)
        assert not list(check_side_file(path, expected, (checkpoint, model, [side]), 2, Silent()))
    stored = load_file(folder / "model.safetensors")
    written = {tensor.name: tensor.data for tensor in GGUFReader(path).tensors}
    patches = stored[TOWER + "patch_embed.proj.weight"].float().numpy()
    for frame, name in enumerate(("v.patch_embd.weight", "v.patch_embd.weight.1")):
        for out in range(32):
            for channel in range(3):
                np.testing.assert_array_equal(
                    written[name][out, channel], patches[out, channel, frame].astype(np.float16)
                )
    qkv = stored[TOWER + "blocks.1.attn.qkv.weight"].float().numpy()
    np.testing.assert_array_equal(written["v.blk.1.attn_qkv.weight"], qkv.astype(np.float16))
    for gguf_name, name in {
        "v.position_embd.weight": "pos_embed.weight",
        "v.post_ln.weight": "merger.norm.weight",
        "mm.0.bias": "merger.linear_fc1.bias",
        "mm.2.bias": "merger.linear_fc2.bias",
    }.items():
        expected = stored[TOWER + name].float().numpy()
        np.testing.assert_array_equal(written[gguf_name], expected)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"deepstack_visual_indexes": [1]}, r"deepstack_visual_indexes is \[1\]"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ({"temporal_patch_size": 1}, "temporal_patch_size is 1"),
        ({"depth": 0}, "depth is 0"),
        ({"patch_size": "16"}, "patch_size is '16'"),
    ],
)
def test_towers_that_are_not_implemented(changes: dict[str, Any], words: str, folder: Path) -> None:
    change_config(folder, **changes)
    with pytest.raises(UnsupportedModelError, match=words):
        side_of(folder)


def test_a_missing_preprocessor_config(folder: Path) -> None:
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"needs preprocessor_config\.json"):
        side_of(folder)


def as_transformers_5_saves(folder: Path, keep: bool = False, **changes: Any) -> None:
    """Image settings inside processor_config.json; with `keep`, the older file stays too."""
    path = folder / "preprocessor_config.json"
    images = json.loads(path.read_text())
    values = {"processor_class": images.pop("processor_class"), "image_processor": images | changes}
    (folder / "processor_config.json").write_text(json.dumps(values))
    if not keep:
        path.unlink()


def of_transformers(folder: Path) -> tuple[Any, Any]:
    values, _ = ImageProcessingMixin.get_image_processor_dict(folder)
    return values["image_mean"], values["image_std"]


def normalization(folder: Path) -> tuple[Any, Any]:
    values = {value.key: value.value for value in side_of(folder).values}
    return values["clip.vision.image_mean"], values["clip.vision.image_std"]


def test_image_settings_as_transformers_5_saves_them(folder: Path) -> None:
    before = side_of(folder)
    as_transformers_5_saves(folder)
    assert side_of(folder).values == before.values
    assert side_of(folder).notes == ()
    assert folder / "processor_config.json" in companion_files(folder)
    assert normalization(folder) == of_transformers(folder)


def test_two_files_of_image_settings_that_agree(folder: Path) -> None:
    as_transformers_5_saves(folder, keep=True)
    assert side_of(folder).notes == ()


def test_two_files_of_image_settings_that_disagree(folder: Path) -> None:
    """The newer file counts, as in transformers and in llama.cpp's converter."""
    as_transformers_5_saves(folder, keep=True, image_mean=[0.1, 0.2, 0.3])
    assert normalization(folder) == of_transformers(folder)
    assert normalization(folder) == ([0.1, 0.2, 0.3], [0.5, 0.5, 0.5])
    (note,) = side_of(folder).notes
    assert note.startswith(f"{folder / 'preprocessor_config.json'}: image_mean is [0.5, 0.5, 0.5]")
    assert "image_processor has [0.1, 0.2, 0.3]" in note


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"image_processor": []}, r"image_processor is \[\], expected an object"),
        ({"image_processor": {"image_mean": [0.5] * 3}}, "image_processor: image_std is None"),
        ({"image_processor": {}}, "image_processor: image_mean is None"),
        ({"image_mean": [0.5] * 3}, "has image_mean outside image_processor"),
    ],
)
def test_image_settings_that_programs_would_read_differently(
    values: dict[str, Any], words: str, folder: Path
) -> None:
    (folder / "processor_config.json").write_text(json.dumps(values))
    with pytest.raises(UnsupportedModelError, match=words):
        side_of(folder)


@pytest.mark.parametrize("mean", [None, [0.5, 0.5], ["0.5"] * 3, [True] * 3])
def test_a_mean_that_is_none(mean: Any, folder: Path) -> None:
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"image_mean": mean}))
    with pytest.raises(UnsupportedModelError, match=r"image_mean is .*expected three numbers"):
        side_of(folder)


@pytest.mark.parametrize("name", ["blocks.2.norm1.weight", "deepstack_merger_list.0.norm.weight"])
def test_an_unknown_tensor(name: str, folder: Path) -> None:
    change_tensors(folder, lambda tensors: tensors.update({TOWER + name: torch.ones(32)}))
    with pytest.raises(UnknownTensorError, match=TOWER + name):
        side_of(folder)


@pytest.mark.parametrize("name", ["pos_embed.weight", "blocks.1.mlp.linear_fc2.bias"])
def test_a_missing_tensor(name: str, folder: Path) -> None:
    change_tensors(folder, lambda tensors: tensors.pop(TOWER + name))
    with pytest.raises(CheckpointError, match=f"{TOWER}{name}' of the vision tower is missing"):
        side_of(folder)


def test_a_tensor_of_another_shape(folder: Path) -> None:
    """The config's shapes and the stored ones must agree before anything is written."""
    name = TOWER + "merger.linear_fc2.weight"
    change_tensors(folder, lambda tensors: tensors.update({name: torch.ones(64, 64)}))
    with pytest.raises(CheckpointError, match=name):
        side_of(folder)
