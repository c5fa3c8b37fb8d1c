"""Layouts of experts: whatever way matrices are stored, the same ones are read."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.errors import CheckpointError, UnknownTensorError, UnsupportedModelError
from reap2gguf.gguf_files import rows
from reap2gguf.gguf_files.rows import read_rows, row_ranges
from reap2gguf.models.contract import MoeModel
from reap2gguf.models.description import Expert
from reap2gguf.models.experts import ExpertLayout
from reap2gguf.models.table import ARCHITECTURES, describe
from reap2gguf.observing import loader
from reap2gguf.observing.loader import WeightLoader
from reap2gguf.observing.readers import Readers
from reap2gguf.observing.targets import layer_targets
from reap2gguf.progress import Silent
from reap2gguf.pruning.view import PrunedView
from reap2gguf.verifying.hf_folder import check_folder
from tests.models.layouts import CASES, Case, stored_of
from tests.models.synthetic import RENAMED, SyntheticMoe, TinySynthetic

TINY = TinySynthetic(mtp=False)
PATH = "block_sparse_moe.experts"
FUSED = ExpertLayout(path=PATH)
LAYOUTS = {
    "2D": RENAMED,
    "3D": FUSED,
    "3D, gate and up alternate": replace(FUSED, interleaved=True),
    "3D transposed": replace(FUSED, orientation="in out"),
    "3D transposed, gate and up alternate": replace(FUSED, orientation="in out", interleaved=True),
    "3D either, straight": replace(FUSED, orientation="either"),
    "3D either, transposed": replace(FUSED, orientation="either"),
    "3D, gate and up one tensor": replace(FUSED, projections=("gate_up", "down")),
    "3D transposed, one tensor": replace(
        FUSED, projections=("gate_up", "down"), orientation="in out"
    ),
    "2D without a gate": replace(RENAMED, projections=("up", "down")),
    "3D without a gate": replace(FUSED, projections=("up", "down")),
}


def fused_names(case: Case) -> list[str]:
    """The stored tensors that hold a projection of all experts of a layer."""
    roles = {name: case.model.role(name) for name in case.stored}
    return [n for n, role in roles.items() if isinstance(role, Expert) and role.expert is None]


@pytest.mark.parametrize("case", [case for case in CASES if fused_names(case)], ids=str)
def test_a_fused_tensor_that_is_missing_is_named(case: Case) -> None:
    name = fused_names(case)[0]
    stored = {n: tensor for n, tensor in case.stored.items() if n != name}
    with pytest.raises(CheckpointError, match=f"'{re.escape(name)}' is missing"):
        case.model.gguf_tensors(stored)


def experts_of(tensors: dict[str, torch.Tensor], layer: int) -> dict[str, torch.Tensor]:
    """gate and up (E, F, H), down (E, H, F)."""
    base = f"model.layers.{layer}.{PATH}"
    names = {"gate": "w1", "up": "w3", "down": "w2"}
    return {
        projection: torch.stack([tensors[f"{base}.{e}.{name}.weight"] for e in range(8)])
        for projection, name in names.items()
    }


def stored_as(name: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors with their experts in a layout."""
    layout = LAYOUTS[name]
    found = {n: t for n, t in tensors.items() if ".experts." not in n}
    for layer in (1, 2):
        base = f"model.layers.{layer}.{PATH}."
        parts = experts_of(tensors, layer)
        if "2D" in name:
            own = [n for n in tensors if n.startswith(base)]
            lost = layout.gate if "gate" not in layout.projections else "none"
            found |= {n: tensors[n] for n in own if f".{lost}." not in n}
            continue
        if "without a gate" in name:
            fused = {layout.up: parts["up"], layout.down: parts["down"]}
        else:
            both = torch.cat((parts["gate"], parts["up"]), 1)
            if layout.interleaved:
                both = torch.stack((parts["gate"], parts["up"]), 2).flatten(1, 2)
            fused = {layout.gate_up: both, layout.down: parts["down"]}
        turned = "transposed" in name
        found |= {base + n: (t.mT if turned else t).contiguous() for n, t in fused.items()}
    return found


@contextmanager
def opened(
    folder: Path, layout: ExpertLayout, tensors: dict[str, torch.Tensor]
) -> Iterator[tuple[Checkpoint, MoeModel]]:
    class Family(SyntheticMoe):
        experts = layout

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ARCHITECTURES, "SyntheticMoe", Family)
        with Checkpoint.open(TINY.write(folder, tensors)) as checkpoint:
            yield checkpoint, describe(checkpoint)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("max_values", [1, 50, 2**22])
def test_gguf_matrices(
    name: str, max_values: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole, or a few rows at a time."""
    monkeypatch.setattr(rows, "MAX_VALUES", max_values)
    tensors = TINY.tensors()
    with opened(tmp_path / "model", LAYOUTS[name], stored_as(name, tensors)) as (weights, model):
        made = model.expert_tensors(2, weights.tensors)
        assert tuple(made) == LAYOUTS[name].projections
        parts = experts_of(tensors, 2)
        parts["gate_up"] = torch.cat((parts["gate"], parts["up"]), 1)
        for projection, tensor in made.items():
            found = [
                read_rows(weights, tensor, slab, first, last)
                for slab in tensor.slabs
                for first, last in row_ranges(tensor)
            ]
            assert tensor.name == f"blk.2.ffn_{projection}_exps.weight"
            expected = parts[projection].float().numpy()
            np.testing.assert_array_equal(np.concatenate(found).reshape(tensor.shape), expected)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("buffer", [48, 2**24])
@pytest.mark.parametrize("dtype", [None, torch.float32], ids=["as stored", "widened"])
def test_what_a_layer_is_read_from(
    name: str,
    buffer: int,
    dtype: torch.dtype | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The loader's tensors, whole or in small buffers, are those that transformers has."""
    monkeypatch.setattr(loader, "BUFFER_BYTES", buffer)
    tensors = TINY.tensors()
    with opened(tmp_path / "model", LAYOUTS[name], stored_as(name, tensors)) as (weights, model):
        widen = dtype is not None
        targets = layer_targets(weights, model, 1, dtype or torch.bfloat16, widen)
        readers = Readers(torch.device("cpu"), 2)
        reads = WeightLoader(weights, torch.device("cpu"), readers)
        reads.ask("layer", targets)
        found = reads.take("layer")
        reads.close()
        readers.close()
    parts = {p: values.to(dtype or torch.bfloat16) for p, values in experts_of(tensors, 1).items()}
    base = "mlp.experts."
    assert torch.equal(found[base + "down_proj"], parts["down"])
    if "without a gate" in name:
        assert torch.equal(found[base + "up_proj"], parts["up"])
    else:
        both = torch.cat((parts["gate"], parts["up"]), 1)
        assert torch.equal(found[base + "gate_up_proj"], both)


def test_a_module_in_the_layout_of_the_checkpoint(tmp_path: Path) -> None:
    """transformers then wants the stored tensors as they are."""
    name = "3D transposed, gate and up alternate"
    layout = replace(LAYOUTS[name], module_is_as_stored=True)
    tensors = stored_as(name, TINY.tensors())
    with opened(tmp_path / "model", layout, tensors) as (weights, model):
        targets = layer_targets(weights, model, 1, torch.float32, False)
    assert targets["mlp.experts.gate_up_proj"].shape == (8, 16, 12)
    assert targets["mlp.experts.down_proj"].shape == (8, 6, 16)
    (run,) = targets["mlp.experts.down_proj"].runs
    assert (run.stored, run.n_values) == (f"model.layers.1.{PATH}.down_proj", 8 * 6 * 16)
    assert targets["mlp.experts.down_proj"].dtype == torch.bfloat16


@pytest.mark.parametrize("suffix", ["", ".weight"])
def test_expert_matrices(suffix: str, tmp_path: Path) -> None:
    tensors = {
        n + suffix if ".experts." in n else n: t
        for n, t in stored_as("3D, gate and up one tensor", TINY.tensors()).items()
    }
    layout = LAYOUTS["3D, gate and up one tensor"]
    with opened(tmp_path / "model", layout, tensors) as (_, model):
        assert model.expert_matrices(1) == (
            ("blk.1.ffn_gate_up_exps.weight",),
            ("blk.1.ffn_down_exps.weight",),
        )


def biased(layout: ExpertLayout, name: str) -> tuple[ExpertLayout, dict[str, torch.Tensor]]:
    tensors = stored_as(name, TINY.tensors())
    for layer in (1, 2):
        base = f"model.layers.{layer}.{PATH}."
        tensors[base + "gate_up_proj_bias"] = torch.arange(8 * 12.0).view(8, 12)
        tensors[base + "down_proj_bias"] = torch.arange(8 * 16.0).view(8, 16)
    return replace(layout, has_biases=True), tensors


@pytest.mark.parametrize("name", ["3D", "3D transposed, gate and up alternate"])
def test_biases(name: str, tmp_path: Path) -> None:
    layout, tensors = biased(LAYOUTS[name], name)
    bias = f"model.layers.1.{PATH}.gate_up_proj_bias"
    with opened(tmp_path / "model", layout, tensors) as (weights, model):
        assert model.role(bias) == Expert(1, "gate_up", None, "bias")
        made = {tensor.name: tensor for tensor in model.gguf_tensors(weights.tensors)}
        gate, up = tensors[bias][:, :6], tensors[bias][:, 6:]
        if layout.interleaved:
            gate, up = tensors[bias][:, ::2], tensors[bias][:, 1::2]
        expected = {"gate": gate, "up": up, "down": tensors[bias.replace("gate_up", "down")]}
        for projection, values in expected.items():
            tensor = made[f"blk.1.ffn_{projection}_exps.bias"]
            assert (tensor.shape, tensor.always_f32) == (tuple(values.shape), True)
            found = read_rows(weights, tensor, tensor.slabs[0], 0, 8)
            np.testing.assert_array_equal(found, values.numpy())
        targets = layer_targets(weights, model, 1, torch.bfloat16, True)
        assert targets["mlp.experts.gate_up_proj_bias"].shape == (8, 12)
        assert targets["mlp.experts.down_proj_bias"].shape == (8, 16)
        kept = {layer: (1, 2, 4, 7) for layer in (1, 2)}
        view = PrunedView(weights, model, kept)
        np.testing.assert_array_equal(view.read_float32(bias), tensors[bias][[1, 2, 4, 7]].numpy())


def test_biases_may_be_zero(tmp_path: Path) -> None:
    """Zeros are no damage: a source may have them."""
    layout, tensors = biased(FUSED, "3D")
    for name, tensor in tensors.items():
        if name.endswith("down_proj_bias"):
            tensors[name] = torch.zeros_like(tensor)
    with opened(tmp_path / "sound", layout, tensors) as (weights, model):
        assert list(check_folder(weights, model, Silent())) == []


def test_biases_where_the_family_has_none() -> None:
    layout, tensors = biased(FUSED, "3D")
    model = model_of(replace(layout, has_biases=False))
    with pytest.raises(UnknownTensorError, match="gate_up_proj_bias"):
        model.check_tensors(stored_of(tensors))


def model_of(layout: ExpertLayout) -> MoeModel:
    class Family(SyntheticMoe):
        experts = layout

    return Family(TINY.config(), "here/config.json", TINY.tensors().keys())


@pytest.mark.parametrize(
    ("layout", "stored"),
    [
        ("3D", "3D transposed"),
        ("3D transposed", "3D"),
        ("3D without a gate", "3D"),
        ("3D", "3D without a gate"),
        ("2D", "3D"),
        ("2D", "2D without a gate"),
    ],
)
def test_another_layout_is_refused(layout: str, stored: str) -> None:
    with pytest.raises((CheckpointError, UnknownTensorError)):
        model_of(LAYOUTS[layout]).check_tensors(stored_of(stored_as(stored, TINY.tensors())))


def test_an_orientation_that_no_shape_tells() -> None:
    """(E, 2F, H) with 2F = H looks the same transposed."""
    tiny = replace(TINY, width=8)

    class Family(SyntheticMoe):
        experts = replace(FUSED, orientation="either")

    names: dict[str, Any] = {n: t for n, t in tiny.tensors().items() if ".experts." not in n}
    for layer in (1, 2):
        base = f"model.layers.{layer}.{PATH}."
        names |= {base + "gate_up_proj": torch.ones(8, 16, 16)}
        names |= {base + "down_proj": torch.ones(8, 16, 8)}
    model = Family(tiny.config(), "here/config.json", names.keys())
    with pytest.raises(UnsupportedModelError, match="does not show whether"):
        model.check_tensors(stored_of(names))
