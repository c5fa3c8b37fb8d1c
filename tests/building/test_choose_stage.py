"""Builds that choose their method by measuring."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from reap2gguf.api.builds import estimate, options_like
from reap2gguf.building import pipeline, stages
from reap2gguf.building.choose_stage import Choose
from reap2gguf.building.plan import make_plan
from reap2gguf.building.repair_stage import Repair
from reap2gguf.bundle.manifest import Manifest
from reap2gguf.errors import ArtifactError, UsageError
from reap2gguf.observing.budget import Budget, Need, fit
from reap2gguf.options import CalibrationOptions, ComputeOptions
from reap2gguf.progress import Silent
from reap2gguf.pruning.select import select_experts
from reap2gguf.terminal.json_views import result_as_json
from reap2gguf.terminal.plan_views import plan_lines
from reap2gguf.terminal.views import result_lines
from reap2gguf.verifying.bundle import verify_bundle
from reap2gguf.verifying.context import Strictness
from reap2gguf.verifying.facts import check_options, check_record
from reap2gguf.verifying.opening import open_source
from tests.building.builds import PROSE, contents, options, stages_reused, stop_at
from tests.building.needs.machines import needs_on
from tests.tiny import REPOSITORY, TinyQwen3Moe

OTHER = REPOSITORY / "calibration" / "code.txt"
CANDIDATES = ("frequency", "reap", "ean_sum")


def auto(model: Path, output: Path, **changes: Any) -> Any:
    return options(
        model,
        output,
        **{
            "method": "auto",
            "candidates": CANDIDATES,
            "choose_text": OTHER,
            "keep_experts": 4,
            "name": "tiny",
            "calibration": CalibrationOptions(str(PROSE), samples=8, max_length=64),
        }
        | changes,
    )


def build(model: Path, output: Path, **changes: Any) -> pipeline.BuildResult:
    result = pipeline.build(make_plan(auto(model, output, **changes)), Silent())
    assert result is not None
    return result


@dataclass(frozen=True)
class Built:
    """A model, and a bundle of it whose method was chosen."""

    model: Path
    output: Path
    result: pipeline.BuildResult

    @property
    def manifest(self) -> Manifest:
        return self.result.manifest


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp("auto")
    model = TinyQwen3Moe(vocab=4096).write(folder / "model")
    return Built(model, folder / "out", build(model, folder / "out"))


def test_the_best_candidate_prunes_the_model(built: Built) -> None:
    manifest = built.manifest
    choice, pruning = manifest.choice, manifest.pruning
    assert choice is not None
    assert [one.name for one in choice.candidates] == list(CANDIDATES)
    assert pruning.method == choice.chosen
    assert choice.other is not None
    assert choice.other.label == "code.txt"
    plan = make_plan(auto(built.model, built.output))
    seen = stages.Observations.load(built.result.gguf_folder / "observations.safetensors")
    kept = select_experts(seen, choice.chosen, plan.target, plan.model.facts)
    assert kept == pruning.kept
    assert Manifest.load(built.result.gguf_folder) == manifest


def test_rows_that_are_held_out_rank_no_experts(built: Built) -> None:
    choice, pruning = built.manifest.choice, built.manifest.pruning
    assert choice is not None
    assert (choice.held_out.n_rows, pruning.n_rows) == (2, 6)
    assert choice.held_out.n_tokens + pruning.n_tokens == 8 * 64
    (component,) = built.manifest.calibration.components
    assert component.rows == 8


def test_the_bundle_verifies(built: Built) -> None:
    with open_source(str(built.model), Silent()) as source:
        strict = Strictness(is_exact=True, source=source)
        assert verify_bundle(built.result.gguf_folder, 2, Silent(), strict).violations == ()


def test_cards_headers_and_results_say_what_was_chosen(built: Built) -> None:
    choice = built.manifest.choice
    assert choice is not None
    for folder in (built.result.hf_folder, built.result.gguf_folder):
        assert folder is not None
        card = (folder / "README.md").read_text()
        assert f"`{choice.chosen}` was chosen among 3 methods" in card
        assert f"| **`{choice.chosen}`** |" in card
        assert "--method auto" in card
        assert "--candidates frequency,reap,ean_sum" in card
        assert "--choose-text code.txt" in card
    lines = list(result_lines(built.result))
    assert f"  method    {choice.chosen}, the best of 3 measured" in lines
    assert result_as_json(built.result)["choice"]["chosen"] == choice.chosen
    plan = make_plan(auto(built.model, built.output.parent / "new"))
    text = " ".join(" ".join(plan_lines(plan, estimate(plan))).split())
    assert "method: the best of frequency, reap, ean_sum, measured on held-out rows" in text
    assert estimate(plan).stages["choose"] > 0


def test_a_build_again_has_nothing_to_do(built: Built) -> None:
    assert stages_reused(build(built.model, built.output)) == {}


def test_two_builds_make_the_same_bytes(built: Built, tmp_path: Path) -> None:
    assert contents(build(built.model, tmp_path)) == contents(built.result)


@pytest.mark.parametrize("where", [Choose, stages.Export])
def test_an_interrupted_build_takes_the_same_choice(
    built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: Any
) -> None:
    with monkeypatch.context() as patch:
        stop_at(patch, where)
        with pytest.raises(KeyboardInterrupt):
            build(built.model, tmp_path)
    needs = estimate(make_plan(auto(built.model, tmp_path)))
    assert ("choose" in needs.reused.stages) == (where is not Choose)
    result = build(built.model, tmp_path)
    reused = stages_reused(result)
    assert reused["observe"]
    assert reused["choose"] == (where is not Choose)
    assert contents(result) == contents(built.result)


def test_other_candidates_are_another_choice_of_the_same_observations(
    built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop_at(patch, stages.Export)
        with pytest.raises(KeyboardInterrupt):
            build(built.model, tmp_path)
    result = build(built.model, tmp_path, candidates=("ean_mean",))
    assert stages_reused(result)["observe"]
    assert not stages_reused(result)["choose"]
    assert result.manifest.pruning.method == "ean_mean"


def test_its_observations_serve_another_ratio(built: Built, tmp_path: Path) -> None:
    given = built.result.gguf_folder / "observations.safetensors"
    result = build(built.model, tmp_path, observations=given, keep_experts=6)
    assert "observe" not in stages_reused(result)
    assert result.manifest.choice is not None
    assert result.manifest.pruning.n_kept == 6
    assert verify_bundle(result.gguf_folder, 2, Silent()).violations == ()
    # they were made on all rows of this calibration but those that another one holds out
    changed = CalibrationOptions(str(PROSE), samples=9, max_length=64)
    with pytest.raises(ArtifactError, match=r"observed on 6 rows .* expected the 7 rows"):
        build(built.model, tmp_path / "other", observations=given, calibration=changed)


def test_an_earlier_bundle_says_how_to_choose(built: Built, monkeypatch: Any) -> None:
    monkeypatch.chdir(built.output.parent)
    with pytest.raises(UsageError, match=r"read the local file 'code.txt'"):
        options_like(
            built.result.gguf_folder,
            model=str(built.model),
            calibration=CalibrationOptions(str(PROSE)),
        )
    found = options_like(
        built.result.gguf_folder,
        model=str(built.model),
        choose_text=OTHER,
        calibration=CalibrationOptions(str(PROSE)),
    )
    assert (found.method, found.candidates) == ("auto", CANDIDATES)


def test_nothing_is_chosen_where_nothing_is_pruned(built: Built, tmp_path: Path) -> None:
    result = build(built.model, tmp_path, keep_experts=8)
    assert "choose" not in stages_reused(result)
    assert result.manifest.choice is None
    assert list(check_options(result.manifest)) == []


def test_a_manifest_that_contradicts_its_choice_is_found(built: Built) -> None:
    manifest, choice = built.manifest, built.manifest.choice
    assert choice is not None
    assert list(check_record(manifest)) == list(check_options(manifest)) == []
    assert manifest.options is not None
    other = next(name for name in CANDIDATES if name != choice.chosen)
    renamed = replace(choice, candidates=[replace(choice.candidates[0], name="best")])
    for changed, message in (
        (replace(choice, chosen=other), "pruning.method is"),
        (replace(choice, chosen=other), "choice.chosen is"),
        (renamed, "choice.candidates is 'best'"),
        (replace(choice, held_out=replace(choice.held_out, n_rows=3)), "pruning.n_rows is 9"),
        (None, "pruning.n_rows is 6"),
    ):
        found = list(check_record(replace(manifest, choice=changed)))
        assert any(message in line for line in found), (message, found)
    found = list(check_options(replace(manifest, choice=None)))
    assert any("options.method is 'auto'" in line for line in found)
    assert any("options.candidates is" in line for line in found)


def test_figures_beyond_all_bounds_are_refused(built: Built, tmp_path: Path) -> None:
    text = (built.result.gguf_folder / "reap2gguf.json").read_text()
    values = json.loads(text)
    values["choice"]["candidates"][0]["held_out"]["divergence"]["error"] = -1.0
    (tmp_path / "reap2gguf.json").write_text(json.dumps(values))
    with pytest.raises(ArtifactError, match="the error of divergence"):
        Manifest.load(tmp_path)
    values["choice"] = 3
    (tmp_path / "reap2gguf.json").write_text(json.dumps(values))
    with pytest.raises(ArtifactError, match="choice is 3, expected a record"):
        Manifest.load(tmp_path)


def test_the_embedded_calibration_has_no_other_text(built: Built, tmp_path: Path) -> None:
    notes: list[str] = []

    class Noted(Silent):
        def note(self, text: str) -> None:
            notes.append(text)

    changes = {"choose_text": None, "calibration": CalibrationOptions(samples=6, max_length=64)}
    plan = make_plan(auto(built.model, tmp_path, compute=ComputeOptions("cpu"), **changes))
    result = pipeline.build(plan, Noted())
    assert result is not None
    assert result.manifest.choice is not None
    assert result.manifest.choice.other is None
    assert any("the calibration is the embedded text itself" in line for line in notes)
    assert any(line.startswith("chosen: ") for line in notes)


def test_a_plan_counts_the_memory_that_the_stage_takes(
    built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By headers alone, and by the decoders of all variants."""
    needs: list[Need] = []

    def noted(need: Need, *others: Any) -> Budget:
        needs.append(need)
        return fit(need, *others)

    monkeypatch.setattr("reap2gguf.building.needs.memory.fit", noted)
    plan = make_plan(auto(built.model, tmp_path))
    found = needs_on(plan)
    assert found.choosing is not None
    assert found.memory_bytes >= found.choosing.host_bytes
    planned = needs[-1]
    monkeypatch.setattr("reap2gguf.evaluating.engine.fit", noted)
    build(built.model, tmp_path)
    measured = needs[-1]
    assert planned.n_positions >= measured.n_positions
    assert planned.longest_row >= measured.longest_row
    same = {"n_positions": measured.n_positions, "longest_row": measured.longest_row}
    assert replace(planned, **same) == measured
    named = needs_on(make_plan(options(built.model, tmp_path, keep_experts=4)))
    assert named.choosing is None
    assert named.stages["choose"] == 0


REPAIRED: dict[str, Any] = {
    "candidates": ("reap", "best+repair"),
    "calibration": CalibrationOptions(str(PROSE), samples=40, max_length=64),
}


@pytest.fixture(scope="module")
def repaired(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Built:
    output = tmp_path_factory.mktemp("repaired")
    return Built(built.model, output, build(built.model, output, **REPAIRED))


def test_the_best_candidate_may_be_repaired(repaired: Built, tmp_path: Path) -> None:
    manifest, choice = repaired.manifest, repaired.manifest.choice
    assert choice is not None
    assert [one.name for one in choice.candidates] == ["reap", "reap+repair"]
    assert choice.chosen == "reap+repair"
    assert manifest.pruning.method == "reap"
    assert manifest.pruning.repair is not None
    assert manifest.pruning.repair.kind == "ridge"
    # the same model as one that is repaired because that was asked for, on the same rows
    given = repaired.result.gguf_folder / "observations.safetensors"
    named = build(
        repaired.model,
        tmp_path,
        observations=given,
        **REPAIRED | {"candidates": ("reap",), "repair": "ridge"},
    )
    assert named.manifest.pruning.repair == manifest.pruning.repair
    assert named.hf_folder is not None
    assert repaired.result.hf_folder is not None
    for name in ("model.safetensors",):
        made = (named.hf_folder / name).read_bytes()
        assert made == (repaired.result.hf_folder / name).read_bytes()


def test_a_bundle_with_a_repair_that_was_chosen_verifies(repaired: Built) -> None:
    with open_source(str(repaired.model), Silent()) as source:
        strict = Strictness(is_exact=True, source=source)
        assert verify_bundle(repaired.result.gguf_folder, 2, Silent(), strict).violations == ()
    manifest = repaired.manifest
    without = replace(manifest, pruning=replace(manifest.pruning, repair=None))
    assert any("pruning.repair is None" in line for line in check_record(without))


@pytest.mark.slow
@pytest.mark.parametrize("where", [Choose, Repair, stages.Export])
def test_an_interrupted_build_with_a_repair_makes_the_same(
    repaired: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: Any
) -> None:
    with monkeypatch.context() as patch:
        stop_at(patch, where)
        with pytest.raises(KeyboardInterrupt):
            build(repaired.model, tmp_path, **REPAIRED)
    result = build(repaired.model, tmp_path, **REPAIRED)
    reused = stages_reused(result)
    assert reused["choose"] == (where is not Choose)
    assert reused["repair"] == (where is stages.Export)
    assert contents(result) == contents(repaired.result)


def test_a_repair_that_is_not_taken_leaves_nothing(
    built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worst = max
    monkeypatch.setattr(
        "reap2gguf.choosing.figures.best",
        lambda found: worst(found, key=lambda one: one.held_out.divergence.value),
    )
    monkeypatch.setattr("reap2gguf.verifying.choice.best", lambda found: found[0])
    result = build(built.model, tmp_path, **REPAIRED)
    assert result.manifest.choice is not None
    assert result.manifest.choice.chosen == "reap"
    assert result.manifest.pruning.repair is None
    assert "repair" not in stages_reused(result)


def test_too_few_rows_for_a_repair_are_a_note(built: Built, tmp_path: Path) -> None:
    result = build(built.model, tmp_path, candidates=("reap", "best+repair"))
    assert result.manifest.choice is not None
    assert [one.name for one in result.manifest.choice.candidates] == ["reap"]
    assert list(check_options(result.manifest)) == []
