"""GGUF files read as checkpoints, against gguf-py's dequantization and the checkpoint itself."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.errors import ArtifactError
from reap2gguf.gguf_files.reader import GgufHeader, GgufTensorInfo, read_gguf_header
from reap2gguf.gguf_source.weights import GgufWeights
from reap2gguf.models.contract import MoeModel
from reap2gguf.models.experts import ExpertLayout
from reap2gguf.models.qwen3_moe import Qwen3Moe
from reap2gguf.models.table import describe
from tests.exporting.files import export_files, plain
from tests.families.mla import TinyMla
from tests.tiny import TinyQwen3Moe, TinyQwen35Moe

TYPES = ("F32", "Q8_0", "Q4_K_M", "IQ4_NL", "BF16")
SPECS: dict[str, Any] = {
    "qwen3": TinyQwen3Moe(hidden=256, width=256, n_experts=3, dense_layers=(0,)),
    "qwen3, fused": TinyQwen3Moe(n_layers=1, hidden=256, width=256, n_experts=3, fused=True),
    "qwen3, tied": TinyQwen3Moe(n_layers=1, hidden=256, width=256, n_experts=3, tied=True),
    "latent attention": TinyMla(hidden=256, width=256, n_experts=3, n_layers=2, rank=256),
    "qwen3.5": TinyQwen35Moe(hidden=256, width=256),
    "qwen3.5, flat": TinyQwen35Moe(hidden=256, width=256, nested=False, fused=False),
}


@dataclass(frozen=True)
class Made:
    """A checkpoint, and files that were made of it by name of their type."""

    checkpoint: Checkpoint
    model: MoeModel
    files: dict[str, Path]

    def header(self, name: str) -> GgufHeader:
        return read_gguf_header(self.files[name])

    def weights(self, name: str) -> GgufWeights:
        return GgufWeights(self.header(name), self.model, self.checkpoint.tensors)


@pytest.fixture(scope="module", params=SPECS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("made")
    folder = SPECS[request.param].write(root / "model")
    files = export_files(folder, root, [plain(name) for name in TYPES])
    with Checkpoint.open(folder) as checkpoint:
        yield Made(checkpoint, describe(checkpoint), files)


@cache
def dequantized(path: Path) -> dict[str, npt.NDArray[np.float32]]:
    """The values of every tensor, by gguf-py."""
    reader = gguf.GGUFReader(path)
    return {
        tensor.name: np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type)).reshape(
            tuple(reversed(tensor.shape.tolist()))
        )
        for tensor in reader.tensors
    }


@pytest.mark.parametrize("name", TYPES)
def test_values_are_those_of_gguf_py(made: Made, name: str) -> None:
    """What the converter would make of the weights, read back, is what the file holds."""
    weights = made.weights(name)
    expected = dequantized(made.files[name])
    covered = set()
    for tensor in weights.model.gguf_tensors(weights.tensors):
        slabs = []
        for slab in tensor.slabs:
            values = weights.read_float32(slab.stored, index=slab.index)
            if slab.rows:
                values = values[slab.rows[0] : slab.rows[1] : slab.step]
            if slab.columns:
                values = values[slice(*slab.columns)].T
            slabs.append(values if tensor.transform is None else tensor.transform(values))
            covered.add(slab.stored)
        found = np.stack(slabs).reshape(tensor.shape)
        if tensor.transform is not None and tensor.name.endswith(("norm.weight", "ssm_a")):
            np.testing.assert_allclose(found, expected[tensor.name], rtol=1e-6, atol=1e-7)
        else:
            np.testing.assert_array_equal(found, expected[tensor.name], err_msg=tensor.name)
    assert covered == weights.tensors.keys()


@pytest.mark.parametrize("name", ["F32", "BF16"])
def test_a_file_without_loss_is_the_checkpoint(made: Made, name: str) -> None:
    weights = made.weights(name)
    for stored in weights.tensors:
        found, expected = weights.read_float32(stored), made.checkpoint.read_float32(stored)
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=2e-7, err_msg=stored)
    assert weights.model.facts == made.model.facts
    assert weights.n_parameters == sum(
        tensor.n_elements
        for name, tensor in made.checkpoint.tensors.items()
        if name in weights.tensors
    )


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_any_bytes_are_those_of_the_whole(made: Made, data: st.DataObject) -> None:
    weights = made.weights("Q4_K_M")
    name = data.draw(st.sampled_from(sorted(weights.tensors)))
    whole = weights.read(name).reshape(-1).view(np.uint8)
    first = data.draw(st.integers(0, len(whole)))
    count = data.draw(st.integers(0, len(whole) - first))
    found = np.empty(count, dtype=np.uint8)
    weights.read_bytes(name, first, found)
    np.testing.assert_array_equal(found, whole[first : first + count])


def changed(header: GgufHeader, name: str, info: GgufTensorInfo | None) -> GgufHeader:
    """The header with a tensor changed, or without it."""
    tensors = {key: value for key, value in header.tensors.items() if key != name}
    return replace(header, tensors=tensors if info is None else {**tensors, name: info})


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("output_norm.weight", None, "is missing, which the model needs"),
        ("experts", {"shape": (2, 256, 256)}, "another number of experts"),
        ("output_norm.weight", {"tensor_type": gguf.GGMLQuantizationType.I8}, "not a type for"),
        ("rope_freqs.weight", {"shape": (8,)}, "holds 'rope_freqs.weight', which the model"),
    ],
)
def test_another_model_is_refused(
    made: Made, name: str, change: dict[str, Any] | None, message: str
) -> None:
    header = made.header("Q8_0")
    if name == "experts":
        name = next(one for one in header.tensors if "ffn_up_exps" in one)
    some = header.tensors.get(name, header.tensors["output_norm.weight"])
    info = None if change is None else replace(some, name=name, **change)
    with pytest.raises(ArtifactError, match=message):
        GgufWeights(changed(header, name, info), made.model, made.checkpoint.tensors)


@pytest.mark.parametrize("orientation", ["out in", "in out"])
@pytest.mark.parametrize("interleaved", [False, True])
def test_fused_experts_in_other_orders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, orientation: Any, interleaved: bool
) -> None:
    layout = ExpertLayout(orientation=orientation, interleaved=interleaved)
    monkeypatch.setattr(Qwen3Moe, "experts", layout)
    folder = TinyQwen3Moe(n_layers=1, width=64, n_experts=3, fused=True).write(tmp_path / "model")
    path = next(folder.glob("*.safetensors"))
    stored = load_file(path)
    if orientation == "in out":
        for name, values in stored.items():
            if ".experts." in name:
                stored[name] = values.transpose(1, 2).contiguous()
        save_file(stored, path, metadata={"format": "pt"})
    files = export_files(folder, tmp_path, [plain("F32")])
    with Checkpoint.open(folder) as checkpoint:
        header = read_gguf_header(files["F32"])
        weights = GgufWeights(header, describe(checkpoint), checkpoint.tensors)
        for name in weights.tensors:
            if ".experts." in name:
                expected = checkpoint.read_float32(name)
                np.testing.assert_array_equal(weights.read_float32(name), expected)
                part = weights.read_float32(name, 3, 6, index=2)
                np.testing.assert_array_equal(part, expected[2, 3:6])


def test_a_file_without_an_mtp_block(made: Made) -> None:
    facts = made.model.facts
    if facts.mtp_layer is None:
        with pytest.raises(ArtifactError, match="is missing"):
            without_layer(made, facts.n_layers - 1)
        return
    weights = without_layer(made, facts.mtp_layer)
    assert weights.model.facts == replace(facts, has_mtp=False, moe_layers=facts.moe_layers[:-1])


def without_layer(made: Made, layer: int) -> GgufWeights:
    header = made.header("Q8_0")
    tensors = {
        name: info for name, info in header.tensors.items() if not name.startswith(f"blk.{layer}.")
    }
    return GgufWeights(replace(header, tensors=tensors), made.model, made.checkpoint.tensors)
