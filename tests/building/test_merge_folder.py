"""`prune` with a merge: the folder, its record, and its verification."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import reap2gguf
from reap2gguf.building.bundle_options import BundleOptions
from reap2gguf.building.bundling import bundle
from reap2gguf.bundle.layout import KEPT_FILE
from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.errors import OutputError, UsageError
from reap2gguf.merging.folder import MergeFolder
from reap2gguf.models.table import describe
from reap2gguf.options import CalibrationOptions, ComputeOptions
from reap2gguf.progress import Silent
from reap2gguf.pruning.history import read_history
from tests.building.builds import PROSE, build
from tests.tiny import TinyQwen3Moe

CALIBRATION = CalibrationOptions(str(PROSE), samples=12, max_length=64)
CPU = ComputeOptions(device="cpu")
MERGE: dict[str, Any] = {"keep_experts": 4, "calibration": CALIBRATION, "compute": CPU}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return TinyQwen3Moe().write(tmp_path_factory.mktemp("merge") / "tiny")


def prune(model: Path, output: Path, method: str = "ream", **changes: Any) -> dict[str, bytes]:
    """Every file of a folder that `prune` writes."""
    reap2gguf.prune(model, None, output, method=method, **{**MERGE, **changes})
    return {file.name: file.read_bytes() for file in output.iterdir()}


def test_a_merged_folder_is_verified_by_its_record(model: Path, tmp_path: Path) -> None:
    output = tmp_path / "merged"
    files = prune(model, output)
    values = json.loads(files[KEPT_FILE])
    record = values["merge"]
    assert (record["method"], record["group_size"]) == ("ream", 16)
    groups = record["layers"]["1"]["groups"]
    assert [group[0] for group in groups] == values["kept_experts"]["1"]
    assert b"merged the others into those that stay, by REAM" in files["README.md"]
    assert b"- merged\n" in files["README.md"]
    report = reap2gguf.verify(output, source=str(model))
    assert not report.violations
    assert any("merge of the experts is not computed again" in n for n in report.not_checked)
    whole: Any = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    assert whole.config.num_experts == 4
    assert torch.isfinite(whole(torch.arange(12)[None]).logits).all()
    number = next(n for n, group in enumerate(groups) if len(group) > 1)
    for part, problem in (
        (f"experts.{number}.up_proj", "is not what the merge gave"),
        ("self_attn.q_proj", "differs"),
    ):
        tensors = load_file(output / "model.safetensors")
        name = f"model.layers.1.{'mlp.' if 'experts' in part else ''}{part}.weight"
        tensors[name][0, 0] += 1
        save_file(tensors, output / "model.safetensors", {"format": "pt"})
        violations = reap2gguf.verify(output, source=str(model)).violations
        assert any(problem in line for line in violations), violations
        alone = reap2gguf.verify(output).violations
        assert any(problem in line for line in alone) == ("experts" in part), alone
        (output / "model.safetensors").write_bytes(files["model.safetensors"])


def test_a_merged_folder_alone_is_compared_with_its_hashes(model: Path, tmp_path: Path) -> None:
    output = tmp_path / "merged"
    files = prune(model, output)
    values = json.loads(files[KEPT_FILE])
    report = reap2gguf.verify(output)
    assert not report.violations
    assert any("compared with the recorded hashes" in line for line in report.not_checked)
    groups = values["merge"]["layers"]["1"]["groups"]
    number = next(n for n, group in enumerate(groups) if len(group) > 1)
    shard = output / "model.safetensors"
    header = int.from_bytes(files[shard.name][:8], "little")
    tensors = json.loads(files[shard.name][8 : 8 + header])
    at = tensors[f"model.layers.1.mlp.experts.{number}.down_proj.weight"]["data_offsets"][0]
    flipped = bytearray(files[shard.name])
    flipped[8 + header + at] ^= 1
    shard.write_bytes(flipped)
    (line,) = reap2gguf.verify(output).violations
    assert "the experts of layer 1 is not what the merge gave" in line
    shard.write_bytes(files[shard.name])
    del groups[-1]
    (output / KEPT_FILE).write_text(json.dumps(values))
    (line,) = reap2gguf.verify(output).violations
    assert "given layer 1 3 experts, expected 4" in line


@pytest.mark.parametrize("layer", [0, 1])
def test_an_interrupted_merge_goes_on_to_the_same_bytes(
    layer: int, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "whole").mkdir()
    whole = prune(model, tmp_path / "whole" / "merged", "hc_smoe")
    save = MergeFolder.save

    def stop(self: MergeFolder, index: int, *rest: Any) -> Any:
        if index == layer:
            raise KeyboardInterrupt
        return save(self, index, *rest)

    output = tmp_path / "merged"
    with monkeypatch.context() as patch:
        patch.setattr(MergeFolder, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            prune(model, output, "hc_smoe")
    assert not output.exists()
    assert prune(model, output, "hc_smoe") == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged", "whole"]


def test_the_experts_of_a_merge_are_a_list_that_prune_takes(model: Path, tmp_path: Path) -> None:
    files = prune(model, tmp_path / "merged")
    again = tmp_path / "again"
    reap2gguf.prune(model, None, again, kept=tmp_path / "merged" / KEPT_FILE)
    found = json.loads((again / KEPT_FILE).read_text())
    assert found["kept_experts"] == json.loads(files[KEPT_FILE])["kept_experts"]
    assert "merge" not in found


def test_a_build_of_a_merged_folder_says_so(model: Path, tmp_path: Path) -> None:
    prune(model, tmp_path / "merged")
    result = build(tmp_path / "merged", tmp_path / "out", keep_experts=3)
    earlier = result.manifest.source.earlier
    assert earlier is not None
    assert (earlier.label, earlier.n_experts, earlier.methods) == ("tiny", 8, ("ream",))
    kept = json.loads((tmp_path / "merged" / KEPT_FILE).read_text())["kept_experts"]
    own = result.manifest.pruning.kept
    assert earlier.kept == {
        layer: tuple(kept[str(layer)][expert] for expert in ids) for layer, ids in own.items()
    }
    card = (result.hf_folder / "README.md").read_text()
    assert "had been merged before: its own record names `tiny` with 8 experts" in card
    assert "In place of these 8 there are 3" in card
    assert "of these 8 remain" not in card
    assert not reap2gguf.verify(result.gguf_folder).violations
    # a second generation of `prune` names the first original; a record that does not fit, nothing
    reap2gguf.prune(tmp_path / "merged", None, tmp_path / "again", keep_experts=2, method="aimer")
    values = json.loads((tmp_path / "again" / KEPT_FILE).read_text())
    assert (values["original"]["label"], values["original"]["n_experts"]) == ("tiny", 8)
    assert values["original"]["methods"] == ["ream", "aimer"]
    for change in ({"n_experts": 1}, {"label": "[a](b)"}, {"kept": {}}, {"methods": 3}, {"x": 1}):
        broken = {**values, "original": {**values["original"], **change}}
        (tmp_path / "again" / KEPT_FILE).write_text(json.dumps(broken))
        notes: list[str] = []
        with Checkpoint.open(tmp_path / "again") as checkpoint:
            assert read_history(checkpoint, describe(checkpoint).facts, notes.append) is None
        assert "does not fit this checkpoint" in notes[0]


def test_what_cannot_be_merged_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nothing to merge"):
        prune(model, tmp_path / "all", keep_experts=8)
    with pytest.raises(UsageError, match="group_size is 1, expected a whole number from 2"):
        prune(model, tmp_path / "one", group_size=1)
    with pytest.raises(UsageError, match="gives experts new weights itself"):
        prune(model, tmp_path / "both", repair="ridge")
    with pytest.raises(UsageError, match="`reap2gguf prune --method ream`"):
        reap2gguf.select(model, method="ream", keep_experts=4)
    with pytest.raises(UsageError, match="--observations were given"):
        reap2gguf.prune(model, tmp_path / "seen", tmp_path / "out", method="ream", **MERGE)
    (tmp_path / "there").mkdir()
    with pytest.raises(OutputError, match="exists already"):
        prune(model, tmp_path / "there")


def test_a_merged_folder_is_no_part_of_a_bundle(model: Path, tmp_path: Path) -> None:
    prune(model, tmp_path / "merged")
    asked = BundleOptions(tmp_path / "merged", (tmp_path / "some.gguf",), source=str(model))
    with pytest.raises(UsageError, match=r"were merged, .* `reap2gguf build --method ream`"):
        bundle(asked, Silent())
