"""Builds whose experts are ranked by their weights alone: nothing is observed for it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import reap2gguf
from reap2gguf.api.builds import estimate
from reap2gguf.building import stages
from reap2gguf.building.pipeline import BuildResult
from reap2gguf.building.plan import make_plan
from reap2gguf.bundle.manifest import Manifest
from reap2gguf.errors import UsageError
from reap2gguf.progress import Silent
from reap2gguf.pruning import weight_scores
from reap2gguf.terminal.plan_views import plan_lines
from reap2gguf.verifying.bundle import verify_bundle
from reap2gguf.verifying.context import Strictness
from reap2gguf.verifying.opening import open_source
from tests.building.builds import build, contents, options, stages_reused, stop_at


@pytest.fixture
def ranked(tiny: Path, tmp_path: Path) -> BuildResult:
    """A bundle whose experts were ranked by AIMER."""
    return build(tiny, tmp_path / "out", method="aimer", keep_experts=6)


def test_nothing_is_observed(ranked: BuildResult, tiny: Path) -> None:
    assert list(stages_reused(ranked)) == ["texts", "prune", "imatrix", "export", "verify"]
    manifest = Manifest.load(ranked.gguf_folder)
    pruning = manifest.pruning
    assert (pruning.method, pruning.n_kept, pruning.n_rows) == ("aimer", 6, 0)
    selection = reap2gguf.select(tiny, method="aimer", keep_experts=6)
    assert pruning.kept == selection.kept
    assert not manifest.has_observations
    with open_source(str(tiny), Silent()) as source:
        report = verify_bundle(ranked.gguf_folder, 2, Silent(), Strictness(True, source))
    assert not report.violations
    assert ranked.hf_folder is not None
    for folder in (ranked.gguf_folder, ranked.hf_folder):
        card = (folder / "README.md").read_text()
        assert "The experts were ranked by their weights alone" in card
        assert "arxiv.org/abs/2603.18492" in card
        assert "for the importance matrix only" in card
        assert "chosen by the calibration texts" not in card
        assert "--method aimer" in card


def test_a_report_says_it(ranked: BuildResult, tmp_path: Path) -> None:
    reap2gguf.report(ranked.gguf_folder, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "by their weights alone: no text was read for it" in page


def test_the_same_bytes_again_and_scores_are_kept(
    ranked: BuildResult, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, n_reads = tmp_path / "again", []
    read = weight_scores.share_out

    def counted(*arguments: object) -> None:
        n_reads.append(arguments)
        read(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(weight_scores, "share_out", counted)
    with monkeypatch.context() as patch:
        stop_at(patch, stages.Export)
        with pytest.raises(KeyboardInterrupt):
            build(tiny, output, method="aimer", keep_experts=6)
    found = options(tiny, output, method="aimer", keep_experts=6)
    assert {"texts", "prune", "imatrix"} <= set(estimate(make_plan(found)).reused.stages)
    again = build(tiny, output, method="aimer", keep_experts=6)
    assert len(n_reads) == 1
    first, second = contents(ranked), contents(again)
    differing = {name for name in first if first[name] != second[name]}
    assert {name.rpartition("/")[2] for name in differing} <= {"reap2gguf.json", "SHA256SUMS"}


def test_a_plan_says_it(tiny: Path, tmp_path: Path) -> None:
    plan = make_plan(options(tiny, tmp_path, method="weight_norms", keep_experts=6))
    assert not plan.observes
    lines = plan_lines(plan, estimate(plan))
    assert any("ranked by their weights alone (weight_norms)" in line for line in lines)


def test_methods_and_observations_that_exclude_each_other(tiny: Path, tmp_path: Path) -> None:
    observations = tmp_path / "observations.safetensors"
    observations.write_bytes(b"")
    with pytest.raises(UsageError, match="--method aimer ranks experts by their weights alone"):
        make_plan(options(tiny, tmp_path, method="aimer", observations=observations))
    with pytest.raises(UsageError, match="--method aimer ranks experts by their weights alone"):
        reap2gguf.select(tiny, observations, method="aimer")
    with pytest.raises(UsageError, match=r"--method msan ranks experts by observations, and none"):
        reap2gguf.prune(tiny, None, tmp_path / "pruned", method="msan")


def test_protected_experts_stay(tiny: Path, tmp_path: Path) -> None:
    """Those with the lowest scores are protected; the bundle says so and can be made again."""
    plain = build(tiny, tmp_path / "plain", keep_experts=4)
    lost = {
        layer: sorted(set(range(8)) - set(ids))[:2]
        for layer, ids in plain.manifest.pruning.kept.items()
    }
    named = ",".join(f"{layer}:{one}" for layer, ids in lost.items() for one in ids)
    result = build(tiny, tmp_path / "out", keep_experts=4, protect=named)
    pruning = result.manifest.pruning
    assert pruning.protected == {layer: tuple(ids) for layer, ids in lost.items()}
    assert pruning.super_experts == {}
    assert Manifest.load(result.gguf_folder) == result.manifest
    for layer, ids in lost.items():
        assert set(ids) <= set(pruning.kept[layer])
        assert len(pruning.kept[layer]) == 4
    with open_source(str(tiny), Silent()) as source:
        report = verify_bundle(result.gguf_folder, 2, Silent(), Strictness(True, source))
    assert not report.violations
    card = (result.gguf_folder / "README.md").read_text()
    assert "Experts that stay whatever they score: 4 named by hand (layer 0: " in card
    assert f"--protect {named}" in card
    changes = {"model": str(tiny), "calibration": options(tiny, tmp_path).calibration}
    like = reap2gguf.options_like(result.gguf_folder, **changes)
    assert like.protect == named
    observations = result.gguf_folder / "observations.safetensors"
    chosen = reap2gguf.select(tiny, observations, keep_experts=4, protect=named)
    assert chosen.kept == pruning.kept
    assert chosen.protected == pruning.protected
    assert "protected: 4 experts that --protect names" in chosen.notes


def test_a_manifest_that_protects_what_is_gone(tiny: Path, tmp_path: Path) -> None:
    result = build(tiny, tmp_path / "out", keep_experts=4, protect="0:1")
    gone = next(one for one in range(8) if one not in result.manifest.pruning.kept[0])
    path = result.gguf_folder / "reap2gguf.json"
    text = path.read_text()
    path.write_text(text.replace('"protected": {\n   "0": [ 1 ]', f'"protected": {{"0": [{gone}]'))
    assert path.read_text() != text
    report = verify_bundle(result.gguf_folder, 2, Silent(), Strictness(False, None))
    assert any("pruning.protected of layer 0" in line for line in report.violations)


def test_super_experts_stay(tiny: Path, tmp_path: Path) -> None:
    seen = reap2gguf.observe(
        tiny,
        tmp_path / "observations.safetensors",
        calibration=options(tiny, tmp_path).calibration,
        compute=options(tiny, tmp_path).compute,
    )
    worst = reap2gguf.select(tiny, seen, keep_experts=2).kept
    lost = next(one for one in range(8) if one not in worst[0])
    peaks = seen.layers[0].output_max
    assert peaks is not None
    peaks[lost] = 1e6
    seen.save(tmp_path / "observations.safetensors")
    result = build(
        tiny,
        tmp_path / "out",
        keep_experts=2,
        observations=tmp_path / "observations.safetensors",
        protect_super_experts=True,
    )
    pruning = result.manifest.pruning
    assert pruning.super_experts == {0: (lost,)}
    assert lost in pruning.kept[0]
    card = (result.gguf_folder / "README.md").read_text()
    assert f"1 with outliers in their outputs (super experts) (layer 0: {lost})" in card
    assert "--protect-super-experts" in card


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"protect": "0:8"}, "the model has no expert 8"),
        ({"protect": "2:0"}, "the model has no experts in that layer"),
        ({"protect": "0:0-6"}, "7 experts are protected and 6 stay"),
        ({"protect": "zero"}, "expected LAYER:EXPERT"),
        ({"protect_super_experts": True, "method": "aimer"}, "finds them by observations"),
    ],
)
def test_protections_that_are_not_possible(
    changes: dict[str, object], message: str, tiny: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        make_plan(options(tiny, tmp_path, keep_experts=6, **changes))
    assert "\n" not in str(caught.value)


def test_a_plan_names_what_is_protected(tiny: Path, tmp_path: Path) -> None:
    changes = {"protect": "0:1", "protect_super_experts": True}
    plan = make_plan(options(tiny, tmp_path, **changes))
    lines = plan_lines(plan, estimate(plan))
    assert any("protected, whatever they score: 0:1" in line for line in lines)
    assert any("super experts are protected" in line for line in lines)


def test_prune_records_what_was_protected(tiny: Path, tmp_path: Path) -> None:
    changes = {"method": "aimer", "keep_experts": 4, "protect": "0:0-1"}
    result = reap2gguf.prune(tiny, None, tmp_path / "pruned", **changes)
    record = json.loads((result.folder / "kept_experts.json").read_text())
    assert record["protected"] == {"0": [0, 1]}
    assert {0, 1} <= set(record["kept_experts"]["0"])


def test_prune_without_observations(tiny: Path, tmp_path: Path) -> None:
    result = reap2gguf.prune(tiny, None, tmp_path / "pruned", method="aimer", keep_experts=4)
    assert (result.folder / "kept_experts.json").is_file()
    assert result.selection.method == "aimer"
    assert all(len(ids) == 4 for ids in result.selection.kept.values())
