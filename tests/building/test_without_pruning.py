"""Builds that keep all experts: a plain quantizer, without a copy of the checkpoint."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import reap2gguf
from reap2gguf.api.builds import estimate
from reap2gguf.building import stages
from reap2gguf.building.pipeline import BuildResult
from reap2gguf.building.plan import make_plan
from reap2gguf.building.workdir import Workdir
from reap2gguf.bundle.card import gguf_card
from reap2gguf.bundle.manifest import Manifest
from reap2gguf.bundle.opening import open_bundle
from reap2gguf.errors import ArtifactError, OutputError, UsageError, VerificationError
from reap2gguf.gguf_files.reader import read_gguf_header
from reap2gguf.progress import Silent
from reap2gguf.terminal.plan_views import plan_lines
from reap2gguf.terminal.views import result_lines
from reap2gguf.verifying.bundle import check_bundle, verify_bundle, verify_paths
from reap2gguf.verifying.context import Strictness
from reap2gguf.verifying.opening import open_source
from reap2gguf.verifying.report import Level, VerifyReport
from tests.building.builds import (
    build,
    contents,
    options,
    stages_reused,
    stop_at,
)
from tests.tiny import TinyQwen3Moe, TinyQwen35Moe


@pytest.fixture(params=[{"compression": 0.0}, {"keep_experts": 8}], ids=lambda one: next(iter(one)))
def whole(request: pytest.FixtureRequest, tiny: Path, tmp_path: Path) -> BuildResult:
    """A bundle with all experts."""
    return build(tiny, tmp_path / "out", **request.param)


def compared(result: BuildResult, model: Path) -> VerifyReport:
    with open_source(str(model), Silent()) as source:
        return verify_bundle(result.gguf_folder, 2, Silent(), Strictness(True, source))


def test_only_gguf_files_are_written(whole: BuildResult, tiny: Path) -> None:
    assert list(stages_reused(whole)) == ["texts", "imatrix", "export", "verify"]
    output = whole.gguf_folder.parent
    assert {entry.name for entry in output.iterdir()} == {".work", "tiny-GGUF"}
    assert not list((output / ".work" / "observations").iterdir())
    assert whole.hf_folder is None
    manifest = Manifest.load(whole.gguf_folder)
    assert manifest == whole.manifest
    assert manifest.hf is None
    pruning = manifest.pruning
    assert (pruning.method, pruning.n_experts, pruning.n_kept) == ("none", 8, 8)
    assert pruning.kept == {0: tuple(range(8)), 1: tuple(range(8))}
    assert manifest.n_parameters == manifest.source.n_parameters
    assert any(str(whole.gguf_folder) in line for line in result_lines(whole))


def test_nothing_says_that_it_was_pruned(whole: BuildResult) -> None:
    card = (whole.gguf_folder / "README.md").read_text()
    front = card.split("---")[1]
    assert "- moe" in front
    for text in (front, card.lower().replace("reap2gguf", "")):
        assert "reap" not in text
    assert "prun" not in front
    assert "Nothing was pruned" in card
    assert "the pruned model" not in card
    assert "use the safetensors of `tiny`" in card
    assert "| experts per layer | 8 |" in card
    (file,) = whole.gguf_folder.glob("*Q8_0.gguf")
    assert file.name == "tiny-Q8_0.gguf"
    own = {key for key in read_gguf_header(file).metadata if key.startswith("reap2gguf.")}
    assert own == {"reap2gguf.version", "reap2gguf.source", "reap2gguf.recipe"}


def test_the_base_model_is_the_source(tiny: Path, tmp_path: Path) -> None:
    manifest = build(tiny, tmp_path / "out", compression=0).manifest
    named = replace(manifest, source=replace(manifest.source, label="owner/tiny"))
    front = gguf_card(named, tiny / "README.md").split("---")[1]
    assert "base_model: owner/tiny" in front
    assert "base_model_relation: quantized" in front


def test_it_is_verified_as_far_as_there_is_something_to_compare(
    whole: BuildResult, tiny: Path
) -> None:
    report = verify_bundle(whole.gguf_folder, 2, Silent())
    assert not report.violations
    assert report.levels["tiny-GGUF/tiny-Q8_0.gguf"] is Level.HASHES
    missing = "the bundle has none of its own; pass --source tiny"
    assert f"values not compared: {missing}" in report.not_checked
    assert f"recipes not applied again: {missing}" in report.not_checked
    assert not any("safetensors not checked" in line for line in report.not_checked)
    report = compared(whole, tiny)
    assert not report.violations
    assert report.levels["tiny-GGUF/tiny-Q8_0.gguf"] is Level.EXACT
    assert report.not_checked == ()
    bundle = open_bundle(whole.gguf_folder)
    assert bundle.hf is None
    check_bundle(bundle, 2, Silent())


def test_values_of_another_model_are_found(whole: BuildResult, tmp_path: Path) -> None:
    other = TinyQwen3Moe(seed=5).write(tmp_path / "other" / "tiny")
    report = compared(whole, other)
    assert "the bundle was not made from tiny" in report.violations[0]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"verification": {"passed": [], "summary": "0 checks passed"}}, "verification.passed is"),
        ({"calibration": {"imatrix_chunks": 7}}, "imatrix.chunk_count"),
    ],
)
def test_a_manifest_that_says_otherwise_is_found(
    tiny: Path, tmp_path: Path, change: dict[str, Any], expected: str
) -> None:
    result = build(tiny, tmp_path / "out", compression=0)
    path = result.gguf_folder / "reap2gguf.json"
    values = json.loads(path.read_text())
    for key, parts in change.items():
        values[key] |= parts
    path.write_text(json.dumps(values))
    report = verify_paths([result.gguf_folder], 2, Silent())
    assert any(expected in line for line in report.violations)


def test_a_pruned_bundle_needs_the_record_of_its_safetensors(tiny: Path, tmp_path: Path) -> None:
    result = build(tiny, tmp_path / "out")
    path = result.gguf_folder / "reap2gguf.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hf": None}))
    with pytest.raises(ArtifactError, match="expected the record of the pruned safetensors"):
        Manifest.load(result.gguf_folder)


def test_the_build_compares_with_the_source(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = stages.export_model

    def damaged(*arguments: Any) -> None:
        real(*arguments)
        for path in arguments[3]:
            with path.open("r+b") as file:
                file.seek(-8, 2)
                file.write(b"\x11" * 8)

    monkeypatch.setattr(stages, "export_model", damaged)
    with pytest.raises(VerificationError, match="differ"):
        build(tiny, tmp_path / "out", compression=0)
    assert not (tmp_path / "out" / "tiny-GGUF").exists()


def test_the_bundle_may_lie_beside_its_source(tiny: Path, tmp_path: Path) -> None:
    before = {file.name: file.read_bytes() for file in tiny.iterdir()}
    result = build(tiny, tmp_path, compression=0)
    assert result.gguf_folder == tmp_path / "tiny-GGUF"
    assert {file.name: file.read_bytes() for file in tiny.iterdir()} == before
    assert not build(tiny, tmp_path, compression=0).stages
    again = build(tiny, tmp_path, compression=0, recipes=("bf16",))
    assert [one.label for one in again.manifest.gguf] == ["Q8_0", "BF16"]
    assert [stage.name for stage in again.stages] == ["export", "verify"]
    assert again.hf_folder is None
    assert not compared(again, tiny).violations
    assert {file.name: file.read_bytes() for file in tiny.iterdir()} == before
    both = build(tiny, tmp_path / "both", compression=0, recipes=("q8_0", "bf16"))
    assert contents(both) == contents(again)
    with pytest.raises(UsageError, match="has no safetensors to make files from"):
        reap2gguf.add(again.gguf_folder, recipes=("q8_0",))
    third = reap2gguf.add(again.gguf_folder, recipes=("q4km",), source=tiny, threads=1)
    all_three = build(tiny, tmp_path / "all", compression=0, recipes=("q8_0", "bf16", "q4km"))
    assert contents(third) == contents(all_three)


def test_an_addition_needs_the_same_source(tiny: Path, tmp_path: Path) -> None:
    result = build(tiny, tmp_path / "out", compression=0)
    other = TinyQwen3Moe(seed=5).write(tmp_path / "other")
    with pytest.raises(VerificationError, match="nothing was added"):
        reap2gguf.add(result.gguf_folder, recipes=("q4km",), source=other)


@pytest.mark.parametrize("changed", [False, True])
def test_naming_is_carried_through_beside_the_source(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: bool
) -> None:
    before = {file.name: file.read_bytes() for file in tiny.iterdir()}
    expected = contents(build(tiny, tmp_path / "out", compression=0))
    with monkeypatch.context() as patch:
        patch.setattr(Workdir, "_discard", lambda work: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            build(tiny, tmp_path, compression=0)
    if changed:
        (tmp_path / "tiny-GGUF" / "imatrix.dat").write_bytes(b"x")
    assert contents(build(tiny, tmp_path, compression=0)) == expected
    assert {file.name: file.read_bytes() for file in tiny.iterdir()} == before


def test_unfinished_work_of_a_pruning_does_not_come_with_it(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop_at(patch, stages.Export)
        with pytest.raises(KeyboardInterrupt):
            build(tiny, tmp_path / "out", name="model")
    result = build(tiny, tmp_path / "out", name="model", compression=0)
    assert {one.name for one in result.gguf_folder.parent.iterdir()} == {".work", "model-GGUF"}
    assert not compared(result, tiny).violations


def test_half_of_another_bundle_is_not_replaced(tiny: Path, tmp_path: Path) -> None:
    build(tiny, tmp_path / "out", name="model")
    with pytest.raises(OutputError, match="belongs to the safetensors in"):
        build(tiny, tmp_path / "out", name="model", compression=0)


def test_the_plan_counts_no_copy(tiny: Path, tmp_path: Path) -> None:
    plan = make_plan(options(tiny, tmp_path, compression=0))
    needs = estimate(plan)
    text = "\n".join(plan_lines(plan, needs))
    assert "no copy of the safetensors" in text
    assert "tiny/" not in text
    pruned = estimate(make_plan(options(tiny, tmp_path, keep_experts=7)))
    assert needs.disk_bytes < pruned.disk_bytes - plan.pruned.n_bytes // 2


@pytest.mark.slow
def test_a_block_for_next_tokens_is_kept_with_all_experts(tmp_path: Path) -> None:
    model = TinyQwen35Moe().write(tmp_path / "tiny")
    result = build(model, tmp_path / "out", compression=0.0)
    mtp = result.manifest.pruning.mtp
    assert mtp.state == "kept"
    assert mtp.n_tokens > 0
    assert mtp.hits_before == mtp.hits_after
    card = (result.gguf_folder / "README.md").read_text()
    assert "kept; top-1 accuracy" in card
    assert "--spec-type draft-mtp" in card
    assert "draft_num_predict" in (result.gguf_folder / "Modelfile").read_text()
    assert result.manifest.side_files
    assert not compared(result, model).violations
