"""`--dequantize bf16`: the safetensors of a quantized source as those of a model in BF16."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from reap2gguf.api.builds import verify
from reap2gguf.api.pruning import prune
from reap2gguf.api.stages import observe
from reap2gguf.building.likeness import read_likeness
from reap2gguf.building.plan import make_plan
from reap2gguf.bundle.manifest import Manifest
from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.errors import UsageError
from reap2gguf.options import CalibrationOptions, ComputeOptions
from tests.building.builds import PROSE, build, options
from tests.models.converted import contents
from tests.quantized import Quantized, as_fp8, as_packed
from tests.tiny import TinyQwen3Moe, save_sharded

CASES = [as_fp8(TinyQwen3Moe(n_shards=2), (24, 20)), as_packed(TinyQwen3Moe())]


def rounded_folder(folder: Path, case: Quantized, target: Path) -> Path:
    """The decoded values in BF16, by torch's own rounding."""
    case.plain.write(target)
    for file in target.glob("*.safetensors*"):
        file.unlink()
    with Checkpoint.open(folder) as opened:
        found = {n: torch.from_numpy(opened.read_float32(n)).bfloat16() for n in opened.tensors}
    save_sharded(found, target, 1)
    return target


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.scheme)
def test_a_build(case: Quantized, tmp_path: Path) -> None:
    folder = case.write(tmp_path / "source")
    how = {"recipes": ("q4km", "bf16"), "name": "model", "compression": 0.5}
    plan = make_plan(options(folder, tmp_path / "planned", dequantize="bf16", **how))
    result = build(folder, tmp_path / "out", dequantize="bf16", **how)
    other = build(rounded_folder(folder, case, tmp_path / "bf16"), tmp_path / "other", **how)
    assert result.hf_folder is not None
    assert other.hf_folder is not None
    config = json.loads((result.hf_folder / "config.json").read_text())
    assert config == json.loads((other.hf_folder / "config.json").read_text())
    assert "quantization_config" not in config
    first, second = (
        load_file(one / "model.safetensors") for one in (result.hf_folder, other.hf_folder)
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert plan.hf_bytes == sum(tensor.nbytes for tensor in first.values())
    for file in ("model-Q4_K_M.gguf", "model-BF16.gguf"):
        pair = [contents(one.gguf_folder / file)["tensors"] for one in (result, other)]
        assert pair[0] == pair[1]
    for source in (None, folder):
        assert verify(result.hf_folder, source=source).violations == ()
        assert verify(result.gguf_folder, source=source).violations == ()
    card = (result.hf_folder / "README.md").read_text()
    assert "decoded and rounded to BF16" in card.replace("\n", " ")
    assert "--dequantize bf16" in card
    assert "byte for byte" not in card
    like = read_likeness(result.gguf_folder / "reap2gguf.json")
    assert like.values()["dequantize"] == "bf16"
    # another source of the same bytes' number would not do
    assert verify(result.hf_folder, source=tmp_path / "bf16").violations


def test_a_bundle_whose_safetensors_are_as_stored_says_so(tmp_path: Path) -> None:
    folder = CASES[0].write(tmp_path / "source")
    result = build(folder, tmp_path / "out", name="model", compression=0.5)
    assert result.hf_folder is not None
    card = (result.hf_folder / "README.md").read_text().replace("\n", " ")
    assert "keep all other weights of the source byte for byte" in card
    of_files = (result.gguf_folder / "README.md").read_text().replace("\n", " ")
    assert "lost precision twice" in of_files
    assert Manifest.load(result.hf_folder).options.dequantize is None  # type: ignore[union-attr]


def test_prune(tmp_path: Path) -> None:
    folder = CASES[0].write(tmp_path / "source")
    seen = observe(
        folder,
        tmp_path / "seen.safetensors",
        calibration=CalibrationOptions(str(PROSE), samples=2, max_length=64),
        compute=ComputeOptions(device="cpu"),
    )
    for name, dequantize in (("stored", None), ("bf16", "bf16")):
        made = prune(folder, seen, tmp_path / name, keep_experts=4, dequantize=dequantize)
        with Checkpoint.open(made.folder) as opened:
            assert (opened.decoding is None) is (dequantize is not None)
        assert verify(made.folder, source=folder).violations == ()
    # one value that is another
    changed = tmp_path / "changed"
    shutil.copytree(tmp_path / "bf16", changed)
    tensors = load_file(changed / "model.safetensors")
    tensors["model.layers.0.mlp.experts.1.up_proj.weight"][3, 5] *= 1.01
    save_sharded(tensors, changed, 1)
    assert any("up_proj" in line for line in verify(changed, source=folder).violations)


def test_nothing_to_write(tmp_path: Path) -> None:
    folder = CASES[1].write(tmp_path / "m")
    with pytest.raises(UsageError, match="no safetensors are written"):
        make_plan(options(folder, tmp_path / "out", dequantize="bf16", compression=0))
    with pytest.raises(UsageError, match="dequantize is 'f32'"):
        options(folder, tmp_path / "out", dequantize="f32")


def test_a_source_in_bf16(tmp_path: Path) -> None:
    said: list[str] = []
    folder = TinyQwen3Moe().write(tmp_path / "m")
    plan = make_plan(options(folder, tmp_path / "out", dequantize="bf16"), said.append)
    assert any("is not quantized, so it changes nothing" in line for line in said)
    assert plan.hf_bytes == 2 * plan.n_parameters
    assert not any("quantized" in caveat for caveat in plan.caveats)


def test_sizes_of_a_plan(tmp_path: Path) -> None:
    for number, case in enumerate(CASES):
        folder = case.write(tmp_path / str(number))
        plan = make_plan(options(folder, tmp_path / "out", compression=0.5))
        stored = sum(tensor.nbytes for tensor in case.tensors().values())
        assert plan.checkpoint.n_bytes == stored
        assert plan.n_parameters < plan.checkpoint.n_parameters
        experts = {n: t for n, t in case.tensors().items() if ".experts." in n}
        router = [t for n, t in case.tensors().items() if ".mlp.gate." in n]
        removed = sum(t.nbytes for n, t in experts.items()) + sum(t.nbytes for t in router)
        assert plan.hf_bytes == stored - removed // 2
        assert "lost precision twice" in plan.caveats[0]
