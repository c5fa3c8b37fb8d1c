"""Builds whose importance matrix comes from the pass that ranks the experts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import reap2gguf
from reap2gguf.api.builds import estimate
from reap2gguf.artifacts.observations import Observations
from reap2gguf.building import given_stage, pipeline
from reap2gguf.building.given import matrix_of
from reap2gguf.building.likeness import read_likeness
from reap2gguf.building.plan import make_plan
from reap2gguf.bundle.layout import OBSERVATIONS_FILE
from reap2gguf.bundle.records import CalibrationRecord
from reap2gguf.errors import ArtifactError, UsageError
from reap2gguf.gguf_files.imatrix import Imatrix, load_imatrix
from reap2gguf.gguf_files.imatrix_fit import cut
from reap2gguf.observing.sweep import Sweep
from reap2gguf.options import CalibrationOptions, ComputeOptions
from reap2gguf.progress import Silent
from reap2gguf.pruning.methods import METHODS, is_from_weights
from reap2gguf.terminal.plan_json import plan_as_json
from reap2gguf.terminal.plan_views import plan_lines
from reap2gguf.verifying.bundle import verify_bundle
from reap2gguf.verifying.context import Strictness
from reap2gguf.verifying.opening import open_source
from tests.building.builds import PROSE, build, contents, options, refuse_at, stages_reused
from tests.tiny import TinyQwen3Moe, TinyQwen35Moe

CALIBRATION = CalibrationOptions(str(PROSE), samples=4, max_length=128)


def violations(result: pipeline.BuildResult, model: Path) -> tuple[str, ...]:
    """What `verify BUNDLE --source MODEL --exact` finds."""
    with open_source(str(model), Silent()) as source:
        strict = Strictness(is_exact=True, source=source)
        return verify_bundle(result.gguf_folder, 2, Silent(), strict).violations


def same(found: Imatrix, expected: Imatrix) -> None:
    assert found.entries.keys() == expected.entries.keys()
    for name, entry in expected.entries.items():
        np.testing.assert_array_equal(found.entries[name].sums, entry.sums, err_msg=name)
        np.testing.assert_array_equal(found.entries[name].counts, entry.counts, err_msg=name)


def with_sums(model: Path, path: Path, sums: bool = True) -> Path:
    compute = ComputeOptions(device="cpu")
    reap2gguf.observe(model, path, calibration=CALIBRATION, compute=compute, imatrix_sums=sums)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return TinyQwen3Moe().write(tmp_path_factory.mktemp("from-source") / "tiny")


@pytest.fixture(scope="module")
def observations(model: Path) -> Path:
    return with_sums(model, model.parent / "sums.safetensors")


@pytest.fixture(scope="module")
def made(model: Path) -> pipeline.BuildResult:
    return build(model, model.parent / "out", imatrix_from="source")


def test_one_sweep_makes_both(model: Path, made: pipeline.BuildResult, tmp_path: Path) -> None:
    """The matrix is that of the unpruned model on the same rows, cut to the kept experts."""
    assert list(stages_reused(made))[:3] == ["texts", "observe", "prune"]
    assert not (made.gguf_folder / "calibration.txt").exists()
    whole = tmp_path / "whole.gguf"
    # the rows are consecutive pieces of the text, as chunks of this size are
    compute = ComputeOptions(device="cpu")
    reap2gguf.imatrix(model, PROSE, whole, chunk=128, compute=compute)
    seen = Observations.load(made.gguf_folder / "observations.safetensors")
    assert seen.imatrix is not None
    assert (seen.imatrix.n_chunks, seen.imatrix.chunk_size) == (4, 128)
    kept = made.manifest.pruning.kept
    found = load_imatrix(made.gguf_folder / "imatrix.gguf")
    same(found, cut(matrix_of(seen.imatrix, ""), kept, "cut"))
    sliced = reap2gguf.slice_imatrix(whole, made.gguf_folder).imatrix
    shapes = {name: entry.sums.shape for name, entry in sliced.entries.items()}
    assert {name: entry.sums.shape for name, entry in found.entries.items()} == shapes
    assert not violations(made, model)


def test_the_same_experts_stay_as_with_two_sweeps(
    model: Path, made: pipeline.BuildResult, tmp_path: Path
) -> None:
    other = build(model, tmp_path)
    assert other.manifest.pruning.kept == made.manifest.pruning.kept
    alone = Observations.load(other.gguf_folder / "observations.safetensors")
    assert alone.imatrix is None
    joint = Observations.load(made.gguf_folder / "observations.safetensors")
    for layer, seen in alone.layers.items():
        np.testing.assert_array_equal(seen.reap_sum, joint.layers[layer].reap_sum)


def test_what_is_said_of_it(model: Path, made: pipeline.BuildResult) -> None:
    record, asked = made.manifest.calibration, made.manifest.options
    assert (record.imatrix_file, record.imatrix_cut_from) == ("observations.safetensors", 8)
    assert (record.imatrix_chunks, record.imatrix_chunk_size) == (4, 128)
    assert asked is not None
    assert asked.imatrix_from == "source"
    assert not [one for one in asked.inputs if one.option == "--imatrix"]
    card = " ".join((made.gguf_folder / "README.md").read_text().split())
    assert "importance matrix of the model before pruning, taken in the pass that ranked" in card
    assert "4 rows of at most 128 tokens of `prose.txt`. Of 8 experts per layer" in card
    assert "--imatrix-from source" in card
    plan = make_plan(options(model, made.gguf_folder.parent, imatrix_from="source"))
    assert plan.n_sweeps == 1
    needs = estimate(plan)
    text = " ".join("\n".join(plan_lines(plan, needs)).split())
    assert "importance matrix: of MODEL, taken in the pass that ranks the experts" in text
    assert plan_as_json(plan, needs)["imatrix_from"] == "source"
    again = read_likeness(made.gguf_folder)
    assert again.build_options(model=str(model), calibration=CALIBRATION).imatrix_from == "source"


def test_a_kill_between_layers_changes_no_byte(
    model: Path, made: pipeline.BuildResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_layers = Sweep.run_layers

    def stop(self: Sweep, layers: range, task: Any) -> None:
        if layers[0] == 1:
            raise KeyboardInterrupt
        run_layers(self, layers, task)

    with monkeypatch.context() as patch:
        patch.setattr(Sweep, "run_layers", stop)
        patch.setattr("reap2gguf.observing.state.MOST_OF_TIME", float("inf"))
        with pytest.raises(KeyboardInterrupt):
            build(model, tmp_path, imatrix_from="source")
    assert list(tmp_path.glob(".work/*/observe.state"))
    with monkeypatch.context() as patch:
        refuse_at(patch, given_stage, "save_both")
        with pytest.raises(KeyboardInterrupt):
            build(model, tmp_path, imatrix_from="source")
    result = build(model, tmp_path, imatrix_from="source")
    assert stages_reused(result)["observe"]
    assert contents(result) == contents(made)
    assert not build(model, tmp_path, imatrix_from="source").stages


def test_another_ratio_needs_no_pass(model: Path, tmp_path: Path) -> None:
    build(model, tmp_path, imatrix_from="source")
    result = build(model, tmp_path, imatrix_from="source", keep_experts=4)
    assert stages_reused(result)["observe"]
    assert not violations(result, model)
    # sums of its own pass: another matrix, so another bundle of the same name
    second = build(model, tmp_path, keep_experts=4)
    assert second.manifest.calibration.imatrix_file is None
    assert not violations(second, model)


def test_given_observations_with_sums(model: Path, observations: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    nothing = CalibrationOptions(str(tmp_path / "empty.txt"))
    given = {"observations": observations, "imatrix_from": "source", "calibration": nothing}
    result = build(model, tmp_path / "out", **given)
    assert list(stages_reused(result)) == ["prune", "imatrix", "export", "verify"]
    seen = Observations.load(observations)
    assert seen.imatrix is not None
    same(
        load_imatrix(result.gguf_folder / "imatrix.gguf"),
        cut(matrix_of(seen.imatrix, ""), result.manifest.pruning.kept, "cut"),
    )
    assert not violations(result, model)
    assert not build(model, tmp_path / "out", **given).stages


def test_given_observations_without_sums_are_refused(model: Path, tmp_path: Path) -> None:
    path = with_sums(model, tmp_path / "plain.safetensors", sums=False)
    with pytest.raises(
        ArtifactError, match=r"plain\.safetensors: these observations carry no sums"
    ):
        make_plan(options(model, tmp_path, observations=path, imatrix_from="source"))
    make_plan(options(model, tmp_path, observations=path))


def test_sums_of_another_model_are_refused(model: Path, observations: Path, tmp_path: Path) -> None:
    seen = Observations.load(observations)
    assert seen.imatrix is not None
    entry = seen.imatrix.entries["blk.0.attn_q.weight"]
    strange = replace(entry, name="blk.9.attn_q.weight")
    imatrix = replace(seen.imatrix, entries={**seen.imatrix.entries, strange.name: strange})
    replace(seen, imatrix=imatrix).save(tmp_path / "strange.safetensors")
    given = {"observations": tmp_path / "strange.safetensors", "imatrix_from": "source"}
    with pytest.raises(ArtifactError, match=r"has an entry for .blk\.9\.attn_q\.weight."):
        make_plan(options(model, tmp_path, **given))


@pytest.mark.parametrize(
    "more",
    [{"imatrix": Path("a.gguf")}, {"imatrix_text": PROSE}, {"imatrix_chunks": 4}],
    ids=lambda more: next(iter(more)),
)
def test_options_of_the_second_pass_are_refused(more: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--imatrix-from source and --imatrix.* exclude each"):
        options(tmp_path, tmp_path, imatrix_from="source", **more)
    with pytest.raises(UsageError, match="imatrix_from"):
        options(tmp_path, tmp_path, imatrix_from="nothing")


def test_a_ranking_by_weights_takes_no_sums(model: Path, tmp_path: Path) -> None:
    given = {"imatrix_from": "source", "method": next(filter(is_from_weights, METHODS))}
    with pytest.raises(UsageError, match="ranks the experts by their weights, in no pass"):
        make_plan(options(model, tmp_path, **given))


def test_where_nothing_is_pruned_the_source_is_measured_anyway(model: Path, tmp_path: Path) -> None:
    result = build(model, tmp_path, imatrix_from="source", compression=0)
    other = build(model, tmp_path / "other", compression=0)
    same(*(load_imatrix(one.gguf_folder / "imatrix.gguf") for one in (result, other)))
    assert not violations(result, model)


@pytest.mark.parametrize("mtp", ["prune", "drop"])
def test_a_model_with_an_mtp_block(mtp: str, tmp_path: Path) -> None:
    tiny = TinyQwen35Moe(vision=False).write(tmp_path / "tiny")
    result = build(tiny, tmp_path / "out", imatrix_from="source", mtp=mtp)
    found = load_imatrix(result.gguf_folder / "imatrix.gguf").entries
    assert any(name.startswith("blk.4.") for name in found) is (mtp == "prune")
    assert found["blk.0.ffn_up_exps.weight"].sums.shape[0] == result.manifest.pruning.n_kept
    assert result.manifest.pruning.mtp.n_tokens == 0
    assert not violations(result, tiny)


def test_the_record_knows_the_file_by_its_name() -> None:
    record = CalibrationRecord(*[None] * 9, imatrix_file=OBSERVATIONS_FILE)
    assert record.is_of_observations
    assert not replace(record, imatrix_file="theirs.gguf").is_of_observations
