"""Builds whose kept experts are repaired: what is written, compared, resumed and recorded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import reap2gguf
from reap2gguf.building import stages
from reap2gguf.building.repair_stage import Repair
from reap2gguf.building.verify_stage import Verify
from reap2gguf.bundle.manifest import Manifest
from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.errors import UsageError
from reap2gguf.options import CalibrationOptions, ComputeOptions
from reap2gguf.pruning.layer_files import tensors_sha256
from reap2gguf.repairing.record import RepairFolder
from tests.building.builds import PROSE, build, contents, options, stages_reused, stop_at
from tests.tiny import TinyQwen3Moe, TinyQwen35Moe

CHANGES: dict[str, Any] = {
    "calibration": CalibrationOptions(str(PROSE), samples=24, max_length=64),
    "keep_experts": 4,
    "method": "weighted_ean_sum",
    "repair": "ridge",
    "name": "repaired",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return TinyQwen3Moe().write(tmp_path_factory.mktemp("repair") / "tiny")


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A build with a repair that nothing interrupted."""
    return build(model, tmp_path_factory.mktemp("whole"), **CHANGES)


def test_the_safetensors_have_new_down_projections_and_nothing_else_is_new(
    model: Path, whole: Any, tmp_path: Path
) -> None:
    plain = build(model, tmp_path, **{**CHANGES, "repair": "none"})
    record = whole.manifest.pruning.repair
    assert record is not None
    assert plain.manifest.pruning.repair is None
    assert record.kind == "ridge"
    assert list(record.layers) == [0, 1]
    with Checkpoint.open(plain.hf_folder) as before, Checkpoint.open(whole.hf_folder) as after:
        assert before.tensors.keys() == after.tensors.keys()
        changed = {
            name
            for name in after.tensors
            if before.read(name).tobytes() != after.read(name).tobytes()
        }
        assert changed
        assert all(name.endswith("down_proj.weight") for name in changed)
        for layer, one in record.layers.items():
            names = [n for n in after.tensors if f"layers.{layer}." in n and "down_proj" in n]
            assert one.alpha is not None
            assert one.sha256 == tensors_sha256(after, names)
            assert one.error_after < one.error_before


def test_a_bundle_with_a_repair_verifies(model: Path, whole: Any) -> None:
    assert not reap2gguf.verify(whole.gguf_folder).violations
    report = reap2gguf.verify(whole.gguf_folder, source=str(model), exact=True)
    assert not report.violations
    assert any("repair" in line for line in report.not_checked)


def test_two_runs_and_runs_that_are_interrupted_give_the_same_bytes(
    model: Path, whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = RepairFolder.save

    def stop(self: RepairFolder, layer: int, *rest: Any) -> Any:
        if layer == 1:
            raise KeyboardInterrupt
        return save(self, layer, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(RepairFolder, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            build(model, tmp_path, **CHANGES)
    for kind in (stages.Export, Verify):
        with monkeypatch.context() as patch:
            stop_at(patch, kind)
            with pytest.raises(KeyboardInterrupt):
                build(model, tmp_path, **CHANGES)
    result = build(model, tmp_path, **CHANGES)
    assert stages_reused(result)["repair"]
    assert contents(result) == contents(whole)


def test_a_changed_file_of_the_repair_is_made_again(
    model: Path, whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop_at(patch, stages.Export)
        with pytest.raises(KeyboardInterrupt):
            build(model, tmp_path, **CHANGES)
    file = next((tmp_path / ".work" / "repaired" / ".repaired").iterdir())
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    result = build(model, tmp_path, **CHANGES)
    assert not stages_reused(result)["repair"]
    assert contents(result) == contents(whole)


def test_given_observations_are_selected_from_and_the_texts_are_read_for_the_repair(
    model: Path, whole: Any, tmp_path: Path
) -> None:
    observations = whole.gguf_folder / "observations.safetensors"
    result = build(model, tmp_path, **CHANGES, observations=observations)
    assert "observe" not in stages_reused(result)
    found, expected = result.manifest.pruning, whole.manifest.pruning
    assert found.kept == expected.kept
    assert found.repair == expected.repair
    assert not reap2gguf.verify(result.gguf_folder).violations


def test_an_evaluation_is_of_the_repaired_model(model: Path, tmp_path: Path) -> None:
    result = build(model, tmp_path, **CHANGES, evaluate="always")
    evaluation = result.manifest.evaluation
    assert evaluation is not None
    source, folder = str(model), str(result.hf_folder)
    text = reap2gguf.EvaluateOptions(text="held-out", chunks=evaluation.text.n_chunks)
    again = reap2gguf.evaluate(source, folder, options=text, compute=ComputeOptions(device="cpu"))
    pruned = [one.perplexity.value for one in evaluation.variants if one.kind == "pruned"]
    assert pruned == [one.perplexity.value for one in again.variants if one.kind == "pruned"]


def test_an_mtp_block_is_pruned_and_not_repaired(tmp_path: Path) -> None:
    model = TinyQwen35Moe(layers="lf").write(tmp_path / "tiny")
    result = build(model, tmp_path / "out", **{**CHANGES, "repair": "scale"})
    record = result.manifest.pruning.repair
    assert record is not None
    assert (record.kind, list(record.layers)) == ("scale", [0, 1])
    assert not reap2gguf.verify(result.gguf_folder, source=str(model)).violations


def test_a_manifest_with_a_repair_is_read_as_it_was_written(model: Path, whole: Any) -> None:
    assert Manifest.load(whole.gguf_folder) == whole.manifest
    like = reap2gguf.options_like(
        whole.gguf_folder, model=model, calibration=CHANGES["calibration"]
    )
    assert like.repair == "ridge"
    assert whole.manifest.options.repair == "ridge"


def test_too_few_rows_are_refused_before_anything_is_observed(model: Path, tmp_path: Path) -> None:
    few = {**CHANGES, "calibration": CalibrationOptions(str(PROSE), samples=15, max_length=64)}
    with pytest.raises(UsageError, match="has 15 rows, expected at least 16"):
        build(model, tmp_path, **few)
    assert not list((tmp_path / ".work" / "observations").iterdir())


def test_nothing_to_repair_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nothing to repair"):
        reap2gguf.plan(replace(options(model, tmp_path), repair="ridge", compression=0.0))


def test_a_plan_says_what_a_repair_takes(model: Path, tmp_path: Path) -> None:
    made = {
        name: reap2gguf.plan(options(model, tmp_path, **CHANGES | {"repair": name}))
        for name in ("none", "scale", "ridge")
    }
    needs = {name: reap2gguf.estimate(plan) for name, plan in made.items()}
    assert [plan.n_sweeps for plan in made.values()] == [2, 3, 3]
    assert needs["none"].stages["repair"] == 0
    assert needs["ridge"].stages["repair"] > needs["scale"].stages["repair"] > 0
    assert needs["ridge"].disk.repaired == 2 * 4 * 64 * 32 * 2  # layers, experts, F x H in bfloat16
    assert Repair.name in needs["ridge"].stages
