"""Builds that divide a size between experts and bits: `--compression auto`.

Rows of 64 and 32 have types with blocks of 32 alone, of which no table has to be made.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest

import reap2gguf
from reap2gguf.api.builds import estimate
from reap2gguf.artifacts.observations import Observations
from reap2gguf.building import weigh_stage
from reap2gguf.building.given import matrix_of
from reap2gguf.building.keys import BuildKeys
from reap2gguf.building.pipeline import BuildResult
from reap2gguf.building.plan import make_plan
from reap2gguf.bundle.budget import budget_of_json
from reap2gguf.errors import ArtifactError, UsageError
from reap2gguf.fitting import counts, errors_table
from reap2gguf.fitting.probing import Probing
from reap2gguf.fitting.trading import Weighing
from reap2gguf.gguf_files.imatrix import load_imatrix, save_gguf
from reap2gguf.options import BuildOptions, CalibrationOptions, ComputeOptions
from reap2gguf.progress import CallbackProgress
from reap2gguf.pruning.methods import OBSERVED
from reap2gguf.terminal.plan_json import plan_as_json
from reap2gguf.terminal.plan_views import plan_lines
from reap2gguf.verifying.budget import check_budget
from tests.building.builds import PROSE, build, contents, options, stages_reused
from tests.exporting.files import gguf_tensors, random_imatrix
from tests.tiny import TinyQwen3Moe

SIZE = 190_000  # bytes
ORDER = ["texts", "observe", "weigh", "prune", "imatrix", "fit", "export", "verify"]
CPU = ComputeOptions(device="cpu")


@dataclass(frozen=True)
class Made:
    model: Path
    result: BuildResult
    notes: list[str]


def weighed_build(model: Path, output: Path, notes: list[str] | None = None, **changes: Any) -> Any:
    said = [] if notes is None else notes
    values = {"recipes": (), "target_size": SIZE, "compression": "auto", **changes}
    return build(model, output, CallbackProgress(lambda event: said.append(event.text)), **values)


def weighed_options(model: Path, output: Path, **changes: Any) -> BuildOptions:
    values = {"recipes": (), "target_size": SIZE, "compression": "auto", **changes}
    return options(model, output, **values)


@pytest.fixture(autouse=True)
def few_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weigh_stage, "WEIGHED_TOKENS", 3 * weigh_stage.CHUNK)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return TinyQwen3Moe().write(tmp_path_factory.mktemp("weighed") / "tiny")


@pytest.fixture
def prefers_six(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model of random weights no expert is worth its bytes, nor the other way round."""
    costs = {8: (1.0, 0.1), 7: (0.5, 0.1), 6: (0.01, 0.001), 5: (0.5, 0.1), 4: (0.6, 0.1)}
    monkeypatch.setattr(Weighing, "costs", lambda self, evaluate: costs)


@pytest.fixture(scope="module")
def made(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    notes: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weigh_stage, "WEIGHED_TOKENS", 3 * weigh_stage.CHUNK)
        patch.setattr(counts, "SHARES", (0.75, 0.5))  # of all of them below
        result = weighed_build(model, tmp_path_factory.mktemp("made"), notes)
    return Made(model, result, notes)


def test_the_number_that_loses_least_is_built(made: Made) -> None:
    manifest = made.result.manifest
    assert [*stages_reused(made.result)] == ORDER
    assert manifest.budget is not None
    assert [one.n_experts for one in manifest.budget.counts] == [6, 4]
    assert manifest.pruning.n_kept == manifest.budget.best.n_experts == 6
    assert manifest.name == "tiny-auto-190000B"
    (record,) = manifest.gguf
    assert record.file == "tiny-auto-190000B-FIT-190000B.gguf"
    assert 0.98 * SIZE < record.n_bytes <= SIZE
    # what was predicted for this number is what it got
    assert manifest.budget.best.bits_per_weight == pytest.approx(record.bits_per_weight, rel=0.03)
    assert not reap2gguf.verify(made.result.gguf_folder).violations


def test_the_table_is_that_of_recipes_budget(made: Made, tmp_path: Path) -> None:
    texts = CalibrationOptions(str(PROSE), samples=4, max_length=128)
    observations = tmp_path / "o.safetensors"
    reap2gguf.observe(made.model, observations, calibration=texts, compute=CPU, imatrix_sums=True)
    budget = made.result.manifest.budget
    assert budget is not None
    imatrix = tmp_path / "i.gguf"
    seen = Observations.load(observations)
    assert seen.imatrix is not None
    save_gguf(matrix_of(seen.imatrix, seen.calibration), imatrix)
    found = reap2gguf.weigh_budget(
        made.model,
        observations=observations,
        imatrix=imatrix,
        keep_experts=(6, 4),
        target_size=SIZE,
        chunks=3,
        sensitivity="table",
        compute=CPU,
    )
    assert found.n_scored == budget.n_scored
    for one, other in zip(found.candidates, budget.counts, strict=True):
        assert one.pruning == pytest.approx(other.pruning, rel=1e-6)
        assert one.quantizing == pytest.approx(other.quantizing, rel=1e-3)


def test_table_and_choice_are_said_and_on_the_cards(made: Made) -> None:
    said = "\n".join(made.notes)
    assert "experts   bits        size" in said
    assert "weigh: 6 of 8 experts stay, at" in said
    assert made.result.hf_folder is not None
    for folder in (made.result.hf_folder, made.result.gguf_folder):
        card = (folder / "README.md").read_text()
        assert "## Experts or bits" in card
        assert "| **6** |" in card
        assert "a file of 185.55 KiB: 6 of 8 experts stay" in card


def test_sensitivities_are_measured_where_that_is_asked_for(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(counts, "SHARES", (0.75,))
    changes: dict[str, Any] = {"sensitivity": "measured"}
    first = weighed_build(model, tmp_path / "out", **changes)
    budget = first.manifest.budget
    assert budget is not None
    assert budget.sensitivity == "measured"
    card = (first.gguf_folder / "README.md").read_text()
    assert "by how much errors of its kind were measured to count in the source" in card
    assert not reap2gguf.verify(first.gguf_folder).violations
    by_table = weighed_build(model, tmp_path / "other", sensitivity=None).manifest.budget
    assert by_table is not None
    assert by_table.sensitivity == "table"  # the default here
    (one,), (other,) = budget.counts, by_table.counts
    assert (one.pruning, one.n_bytes) == (other.pruning, pytest.approx(other.n_bytes, rel=0.01))
    assert one.quantizing != other.quantizing
    # another size of the same experts measures nothing again
    monkeypatch.setattr(Probing, "_measured", lambda *_: pytest.fail("measured again"))
    more = weighed_build(model, tmp_path / "out", target_size=SIZE - 10_000, **changes)
    assert more.manifest.budget.sensitivity == "measured"


def test_the_way_to_predict_is_a_part_of_what_was_asked(model: Path, tmp_path: Path) -> None:
    ways = (None, "table", "measured")
    plans = [make_plan(weighed_options(model, tmp_path, sensitivity=way)) for way in ways]
    keys = [BuildKeys(plan).inputs.base for plan in plans]
    assert keys[0] == keys[1] != keys[2]
    seconds = [estimate(plan).stages["weigh"] for plan in plans]
    assert seconds[0] == seconds[1] < seconds[2]
    # types of the file are chosen by what is measured, unless the table is asked for
    assert [plan.sized.n_probes > 0 for plan in plans if plan.sized] == [True, False, True]


def test_a_named_number_makes_the_same_tensors(made: Made, tmp_path: Path) -> None:
    named = build(
        made.model,
        tmp_path / "out",
        recipes=(),
        target_size=SIZE,
        keep_experts=6,
        name=made.result.manifest.name,
    )
    assert named.manifest.pruning.kept == made.result.manifest.pruning.kept
    assert [one.tensors for one in named.manifest.gguf] == [
        one.tensors for one in made.result.manifest.gguf
    ]


def test_the_same_command_again_is_up_to_date_and_another_recipe_is_added(
    model: Path, tmp_path: Path, prefers_six: None
) -> None:
    first = weighed_build(model, tmp_path / "out")
    before = contents(first)
    assert not weighed_build(model, tmp_path / "out").stages
    needs = estimate(make_plan(weighed_options(model, tmp_path / "out")))
    assert needs.reused.is_up_to_date
    more = weighed_build(model, tmp_path / "out", recipes=("q8_0",))
    assert {one.label for one in more.manifest.gguf} == {"FIT-190000B", "Q8_0"}
    assert more.manifest.budget == first.manifest.budget
    after = contents(more)
    name = first.manifest.gguf[0].file
    assert after[f"{first.gguf_folder.name}/{name}"] == before[f"{first.gguf_folder.name}/{name}"]
    assert not reap2gguf.verify(more.gguf_folder).violations


def test_like_builds_the_same_without_weighing(made: Made, tmp_path: Path) -> None:
    again = reap2gguf.options_like(
        made.result.gguf_folder,
        model=str(made.model),
        output=tmp_path / "again",
        calibration=CalibrationOptions(str(PROSE), samples=4, max_length=128),
    )
    assert (again.keep_experts, again.compression) == (6, None)


@pytest.mark.parametrize("place", ["measured", "written"])
def test_an_interrupted_weighing_ends_in_the_same_bytes(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prefers_six: None, place: str
) -> None:
    whole = weighed_build(model, tmp_path / "whole")
    measure, done = errors_table._measure_one, []

    def some(*arguments: Any) -> Any:
        if place == "measured" and len(done) == 20:
            raise KeyboardInterrupt
        done.append(arguments)
        return measure(*arguments)

    def stop(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(errors_table, "_measure_one", some)
        patch.setattr(errors_table, "_SECONDS_KEPT", 0.0)
        if place == "written":
            patch.setattr(weigh_stage, "write_whole", stop)
        with pytest.raises(KeyboardInterrupt):
            weighed_build(model, tmp_path / "out")
    n_done = len(done)
    assert "observe" in estimate(make_plan(weighed_options(model, tmp_path / "out"))).reused.stages
    monkeypatch.setattr(errors_table, "_measure_one", some)
    place = "again"
    again = weighed_build(model, tmp_path / "out")
    assert stages_reused(again)["observe"]
    assert n_done < len(done)
    assert contents(again) == contents(whole)


def test_where_all_experts_stay_nothing_is_pruned(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cheap(self: Weighing, evaluate: Any) -> Any:
        return {count: (0.0 if count == 8 else 9.0, 0.1) for count in self.choices}

    monkeypatch.setattr(Weighing, "costs", cheap)
    changes = {"imatrix_from": "source", "recipes": ("q8_0",), "name": "whole"}
    found = weighed_build(model, tmp_path / "out", **changes)
    manifest = found.manifest
    assert found.hf_folder is None
    assert (manifest.pruning.method, manifest.pruning.n_kept) == ("none", 8)
    assert manifest.budget is not None
    assert manifest.budget.best.n_experts == 8
    assert not (tmp_path / "out" / "whole").exists()
    assert manifest.calibration.is_of_observations  # no second pass was made
    assert not reap2gguf.verify(found.gguf_folder).violations
    assert not weighed_build(model, tmp_path / "out", **changes).stages
    changes["recipes"] = ("q8_0", "q5_0")
    more = weighed_build(model, tmp_path / "out", **changes)
    assert len(more.manifest.gguf) == 3
    assert not reap2gguf.verify(more.gguf_folder).violations


def test_where_all_experts_stay_a_repair_is_left_out_with_a_note(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cheap(self: Weighing, evaluate: Any) -> Any:
        return {count: (0.0 if count == 8 else 9.0, 0.1) for count in self.choices}

    monkeypatch.setattr(Weighing, "costs", cheap)
    notes: list[str] = []
    rows = CalibrationOptions(str(PROSE), samples=20, max_length=64)
    found = weighed_build(model, tmp_path / "out", notes, calibration=rows, repair="scale")
    assert found.manifest.pruning.n_kept == 8
    assert found.manifest.pruning.repair is None
    (line,) = (line for line in notes if "--repair" in line)
    assert line.startswith("--repair scale is left out: all experts stay")


def test_a_method_is_chosen_at_that_number(model: Path, tmp_path: Path, prefers_six: None) -> None:
    found = weighed_build(
        model,
        tmp_path / "out",
        method="auto",
        candidates=("frequency", "reap"),
        calibration=CalibrationOptions(str(PROSE), samples=12, max_length=128),
    )
    manifest = found.manifest
    assert manifest.choice is not None
    assert manifest.budget is not None
    assert manifest.budget.method == "frequency"
    assert manifest.pruning.n_kept == 6
    assert [*stages_reused(found)][2:4] == ["weigh", "choose"]
    assert not reap2gguf.verify(found.gguf_folder).violations


def test_given_files_take_the_place_of_the_pass(
    model: Path, tmp_path: Path, prefers_six: None
) -> None:
    texts = CalibrationOptions(str(PROSE), samples=4, max_length=128)
    observations, imatrix = tmp_path / "o.safetensors", tmp_path / "i.gguf"
    reap2gguf.observe(model, observations, calibration=texts, compute=CPU)
    save_gguf(random_imatrix(gguf_tensors(model)), imatrix)
    given = {"observations": observations, "imatrix": imatrix}
    found = weighed_build(model, tmp_path / "out", **given)
    assert found.manifest.pruning.n_kept == 6
    assert found.manifest.calibration.imatrix_file == "i.gguf"
    with pytest.raises(UsageError, match=r"carry no sums .* `reap2gguf observe --imatrix-sums`"):
        make_plan(weighed_options(model, tmp_path / "x", observations=observations))
    cut = tmp_path / "cut.gguf"
    save_gguf(load_imatrix(found.gguf_folder / "imatrix.gguf"), cut)
    with pytest.raises(ArtifactError, match=r"expected 8 x 32; .* of MODEL with all its experts"):
        make_plan(weighed_options(model, tmp_path / "x", imatrix=cut))


def test_protected_experts_stay_and_a_plan_drops_numbers_without_room(
    model: Path, tmp_path: Path
) -> None:
    plan = make_plan(weighed_options(model, tmp_path / "x", protect="*:0-4"))
    assert plan.counts == (8, 7, 6, 5)
    with pytest.raises(UsageError, match="there is nothing to weigh"):
        make_plan(weighed_options(model, tmp_path / "x", protect="*:0-7"))
    with pytest.raises(UsageError, match="the model has no expert 9"):
        make_plan(weighed_options(model, tmp_path / "x", protect="0:9"))


def test_a_plan_says_what_is_not_known(model: Path, tmp_path: Path) -> None:
    plan = make_plan(weighed_options(model, tmp_path / "x"))
    needs = estimate(plan)
    text = " ".join(" ".join(plan_lines(plan, needs)).split())
    assert "experts: keeps 8, 7, 6, 5, 4 of 8" in text
    assert "It is known when the experts have been observed; until then, figures are for 7" in text
    assert "if all of them stay, nothing is pruned" in text
    assert "parameters remain" in text
    assert "up to " in text
    assert needs.stages["weigh"] > 0
    assert plan_as_json(plan, needs)["experts"]["weighed"] == [8, 7, 6, 5, 4]


def test_bits_per_weight_are_those_of_all_experts(model: Path, tmp_path: Path) -> None:
    plan = make_plan(weighed_options(model, tmp_path / "x", target_size=None, target_bpw=6.0))
    whole = make_plan(options(model, tmp_path / "y", recipes=(), target_bpw=6.0, compression=0))
    size = plan.options.target_size
    assert size is not None
    assert 10_000 < size - whole.recipes[0].n_bytes < 16_000  # a header with a tokenizer
    assert plan.options.target_bpw is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_size": None, "recipes": ("q8_0",)}, r"no size is given; pass --target-size"),
        ({"keep_experts": 6}, r"--keep-experts and --compression auto both set"),
        ({"kept": Path("kept.json")}, r"--kept names them"),
        ({"method": "aimer"}, r"--method aimer makes none; pass another --method"),
        ({"method": "ream"}, r"measures what it costs to remove experts, and --method ream merges"),
        ({"compression": "half"}, r"compression is 'half', expected a number"),
        ({"target_size": 20_000}, r"^with 4 of 8 experts, the fewest that are weighed, a file of "),
    ],
)
def test_what_cannot_be_weighed_is_refused(
    model: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        make_plan(weighed_options(model, tmp_path / "x", **changes))


def test_a_record_against_its_pruning(made: Made) -> None:
    manifest = made.result.manifest
    assert not [*check_budget(manifest)]
    assert manifest.budget is not None
    counts = [
        replace(one, pruning=0.0 if one.n_experts == 4 else 9.0) for one in manifest.budget.counts
    ]
    text = json.dumps(asdict(manifest.budget))
    assert budget_of_json(json.loads(text)) == manifest.budget
    older = json.loads(text)
    del older["sensitivity"]  # of a program before it was recorded
    assert budget_of_json(older) == manifest.budget
    with pytest.raises(ValueError, match="sensitivity is 'felt', expected table or measured"):
        budget_of_json({**older, "sensitivity": "felt"})
    other = replace(manifest, budget=replace(manifest.budget, counts=counts, method="magic"))
    assert [*check_budget(other)] == [
        "reap2gguf.json: pruning.n_kept is 6, expected 4, with the least damage",
        "reap2gguf.json: budget.method is 'magic', expected one of " + ", ".join(OBSERVED),
    ]
