"""The types of a projector's tensors hold all their values."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader
from safetensors.torch import load_file, save_file

from reap2gguf.building.plan import make_plan
from reap2gguf.checkpoint import weights
from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.errors import CheckpointError, UnsupportedModelError
from reap2gguf.models.description import SideFile
from reap2gguf.models.side_values import side_files
from reap2gguf.models.table import describe
from reap2gguf.progress import Silent
from reap2gguf.verifying.bundle import verify_bundle
from tests.building.builds import build, options
from tests.tiny import TinyQwen35Moe

TOWER = "model.visual."
WIDE = TOWER + "blocks.0.mlp.linear_fc2.weight"
F16, F32 = GGMLQuantizationType.F16, GGMLQuantizationType.F32


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return TinyQwen35Moe(mtp=False).write(tmp_path / "tiny")


def put(folder: Path, name: str, value: float) -> None:
    """Change the last value of a tensor."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors[name].view(-1)[-1] = value
    save_file(tensors, path, {"format": "pt"})


def checked(folder: Path) -> SideFile:
    with Checkpoint.open(folder) as checkpoint:
        (side,) = side_files(describe(checkpoint), checkpoint)
        return side


def test_a_tower_within_f16_is_left_alone(folder: Path) -> None:
    with Checkpoint.open(folder) as checkpoint:
        (before,) = describe(checkpoint).side_files(folder, checkpoint.tensors)
    after = checked(folder)
    assert after.tensor_types() == before.tensor_types()
    assert (after.values, after.notes, after.is_checked) == (before.values, (), True)


@pytest.mark.parametrize(
    ("value", "kind"),
    [(65280.0, F16), (-65280.0, F16), (65536.0, F32), (-65536.0, F32), (1e5, F32), (3e38, F32)],
)
def test_values_decide_the_type(folder: Path, value: float, kind: GGMLQuantizationType) -> None:
    """In BF16 there is no number between 65,280 and 65,536."""
    put(folder, WIDE, value)
    side = checked(folder)
    kinds = side.tensor_types()
    assert kinds.pop("v.blk.0.ffn_down.weight") is kind
    assert kinds["v.blk.1.ffn_down.weight"] is F16
    assert len(side.notes) == (kind is F32)


@pytest.mark.parametrize(("value", "kind"), [(65519.0, F16), (65520.0, F32)])
def test_the_limit_is_where_numpy_rounds_to_infinity(
    tmp_path: Path, value: float, kind: GGMLQuantizationType
) -> None:
    folder = TinyQwen35Moe(mtp=False, dtype=torch.float32).write(tmp_path / "tiny")
    put(folder, WIDE, value)
    assert checked(folder).tensor_types()["v.blk.0.ffn_down.weight"] is kind
    with np.errstate(over="ignore"):
        assert np.isinf(np.float32(value).astype(np.float16)) == (kind is F32)


def test_a_bundle_with_a_wide_tower(folder: Path, tmp_path: Path) -> None:
    put(folder, WIDE, 1e5)
    notes: list[str] = []
    plan = make_plan(options(folder, tmp_path / "out"), notes.append)
    (note,) = notes
    assert note == (
        f"'{WIDE}' holds values up to 99840, beyond F16; v.blk.0.ffn_down.weight is written as F32"
    )
    (side,) = plan.side_files
    assert side.tensor_types()["v.blk.0.ffn_down.weight"] is F32
    result = build(folder, tmp_path / "out")
    (record,) = result.manifest.side_files
    assert record.tensors["v.blk.0.ffn_down.weight"] == "F32"
    assert not verify_bundle(result.gguf_folder, 2, Silent()).violations
    written = {t.name: t.data for t in GGUFReader(result.gguf_folder / record.file).tensors}
    expected = load_file(folder / "model.safetensors")[WIDE].float().numpy()
    np.testing.assert_array_equal(written["v.blk.0.ffn_down.weight"], expected)


def test_a_patch_embedding_beyond_f16_is_refused_in_the_plan(folder: Path, tmp_path: Path) -> None:
    put(folder, TOWER + "patch_embed.proj.weight", 1e5)
    with pytest.raises(
        UnsupportedModelError, match=r"patch_embed\.proj\.weight' holds values up to 99840"
    ):
        make_plan(options(folder, tmp_path / "out"))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "name", ["blocks.1.attn.qkv.weight", "blocks.1.norm1.bias", "pos_embed.weight"]
)
def test_values_that_are_not_finite_are_refused_by_name(
    folder: Path, tmp_path: Path, name: str, value: float
) -> None:
    put(folder, TOWER + name, value)
    with pytest.raises(CheckpointError, match=f"'{TOWER}{name}' holds NaN or infinite values"):
        make_plan(options(folder, tmp_path / "out"))


def test_values_are_read_a_part_at_a_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "_VALUES", 100)
    put(folder, WIDE, 1e5)
    assert checked(folder).tensor_types()["v.blk.0.ffn_down.weight"] is F32
    with Checkpoint.open(folder) as checkpoint:
        parts = list(weights.values_of(checkpoint, WIDE))
        assert len(parts) > 10
        np.testing.assert_array_equal(np.concatenate(parts), checkpoint.read_float32(WIDE))
