"""Builds and prunings whose experts are named in a file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import reap2gguf
from reap2gguf.api.builds import estimate
from reap2gguf.building.plan import make_plan
from reap2gguf.bundle.manifest import Manifest
from reap2gguf.errors import ArtifactError, Reap2ggufError, UsageError
from reap2gguf.models.description import ModelFacts
from reap2gguf.progress import Silent
from reap2gguf.pruning.given_kept import check_kept_map, read_kept_map
from reap2gguf.terminal.plan_views import plan_lines
from reap2gguf.verifying.bundle import verify_bundle
from reap2gguf.verifying.context import Strictness
from reap2gguf.verifying.opening import open_source
from tests.building.builds import build, contents, options, stages_reused
from tests.pruning.test_select import facts

__all__ = ["facts"]  # a fixture

KEPT = {"0": [0, 2, 3, 5, 6, 7], "1": [0, 1, 2, 3, 4, 7]}


def written(folder: Path, values: Any, name: str = "map.json") -> Path:
    path = folder / name
    path.write_text(values if isinstance(values, str) else json.dumps(values))
    return path


def test_a_build_keeps_them(tiny: Path, tmp_path: Path) -> None:
    path = written(tmp_path, KEPT)
    result = build(tiny, tmp_path / "out", kept=path)
    assert list(stages_reused(result)) == ["texts", "prune", "imatrix", "export", "verify"]
    assert result.gguf_folder.name == "tiny-pruned-0.25-GGUF"
    manifest = Manifest.load(result.gguf_folder)
    assert manifest.pruning.method == "given"
    assert manifest.pruning.kept == {int(layer): tuple(ids) for layer, ids in KEPT.items()}
    assert not manifest.has_observations
    with open_source(str(tiny), Silent()) as source:
        report = verify_bundle(result.gguf_folder, 2, Silent(), Strictness(True, source))
    assert not report.violations
    card = (result.gguf_folder / "README.md").read_text()
    assert "pruned by a given list of experts" in card
    assert "The experts that stay were named in a list" in card
    assert "--kept map.json" in card
    assert "--keep-experts" not in card
    assert manifest.options is not None
    assert [one.option for one in manifest.options.inputs if one.name == "map.json"] == ["--kept"]
    reap2gguf.report(result.gguf_folder, tmp_path / "report.html")
    assert "those that stay were named in a list" in (tmp_path / "report.html").read_text()


def test_what_prune_and_build_write_can_be_given(tiny: Path, tmp_path: Path) -> None:
    """The same weights come out, whatever chose the experts at first."""
    first = reap2gguf.prune(tiny, None, tmp_path / "first", method="aimer", keep_experts=6)
    again = reap2gguf.prune(tiny, None, tmp_path / "again", kept=first.folder / "kept_experts.json")
    assert (again.selection.method, again.selection.kept) == ("given", first.selection.kept)
    for name in ("model.safetensors", "config.json"):
        assert (first.folder / name).read_bytes() == (again.folder / name).read_bytes()
    built = build(tiny, tmp_path / "out", method="aimer", keep_experts=6)
    given = build(tiny, tmp_path / "given", kept=built.gguf_folder / "reap2gguf.json")
    assert given.manifest.pruning.kept == first.selection.kept
    one, other = (
        {name: value for name, value in contents(result).items() if name.endswith("safetensors")}
        for result in (built, given)
    )
    assert list(one.values()) == list(other.values())
    by_mapping = reap2gguf.select(tiny, kept=dict(first.selection.kept))
    assert by_mapping.kept == first.selection.kept


def test_a_plan_says_it_and_like_asks_for_the_file(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path, KEPT)
    plan = make_plan(options(tiny, tmp_path / "out", kept=path))
    assert any("are those of map.json" in line for line in plan_lines(plan, estimate(plan)))
    result = build(tiny, tmp_path / "out", kept=path)
    changes = {"model": str(tiny), "calibration": options(tiny, tmp_path).calibration}
    with pytest.raises(UsageError, match=r"'map.json'.*pass it with --kept FILE"):
        reap2gguf.options_like(result.gguf_folder, **changes)
    like = reap2gguf.options_like(result.gguf_folder, **changes, kept=path)
    assert make_plan(like).target.n_kept == 6


@pytest.mark.parametrize(
    ("changes", "other"),
    [
        ({"keep_experts": 6}, "--keep-experts"),
        ({"compression": 0.25}, "--compression"),
        ({"observations": Path("o.safetensors")}, "--observations"),
        ({"method": "msan"}, "--method msan"),
        ({"protect": "0:1"}, "--protect"),
        ({"protect_super_experts": True}, "--protect-super-experts"),
    ],
)
def test_other_ways_to_choose_are_refused(
    changes: dict[str, Any], other: str, tiny: Path, tmp_path: Path
) -> None:
    path = written(tmp_path, KEPT)
    with pytest.raises(UsageError, match=f"{other} chooses them too"):
        make_plan(options(tiny, tmp_path, kept=path, **changes))
    observations = changes.pop("observations", None)
    with pytest.raises(UsageError, match=f"{other} chooses them too"):
        reap2gguf.select(tiny, observations, kept=path, **changes)


def changed(layer: str, ids: Any) -> dict[str, Any]:
    return {**KEPT, layer: ids}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ("", "map.json"), ("[1]", "map.json"), ("{", "map.json"), ("{}", "layer 0 is missing"),
        ({"0": KEPT["0"]}, r"layer 1 is missing \(1 of 2 MoE layers\)"),
        (changed("2", [0]), "layer 2 has no experts in this model"),
        (changed("1", [0, 1, 2]), "layer 1 keeps 3 experts and layer 0 6"),
        (changed("1", []), "layer 1 keeps no experts"),
        (changed("1", [0, 1, 2, 3, 4, 8]), "layer 1 keeps expert 8, and the model has 0 to 7"),
        (changed("1", [0, 1, 2, 3, 4, -1]), "-1 is not an expert id"),
        (changed("1", [0, 1, 2, 3, 4, 4]), "layer 1 keeps expert 4 twice"),
        (changed("1", [0, 1, 2, 3, 4, True]), "True is not an expert id"),
        (changed("1", [0, 1, 2, 3, 4, 5.0]), "5.0 is not an expert id"),
        (changed("1", "0,1"), "something else than lists"),
        (changed("one", [0]), "'one' is not the number of a layer"),
        ({"kept_experts": [1]}, "expected expert ids by layer"),
        ({"pruning": {"kept": {"0": [0, 1]}}}, "layer 1 is missing"),
        ({"0": [1], "1": [2]}, "keep at least 2"),
        ({"0": list(range(8)), "1": list(range(8))}, "keeps all 8 experts"),
    ],
)  # fmt: skip
def test_maps_that_do_not_fit(values: Any, message: str, tiny: Path, tmp_path: Path) -> None:
    path = written(tmp_path, values)
    with pytest.raises(Reap2ggufError, match=message) as caught:
        make_plan(options(tiny, tmp_path / "out", kept=path))
    assert "\n" not in str(caught.value)
    assert "map.json" in str(caught.value) or "keeping" in str(caught.value)


def test_a_missing_file(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"gone\.json"):
        make_plan(options(tiny, tmp_path, kept=tmp_path / "gone.json"))


def test_groups_of_the_router_share_evenly(facts: ModelFacts) -> None:
    grouped = replace(facts, n_groups=2)
    assert check_kept_map({0: (7, 0, 1, 6)}, grouped, "map") == {0: (0, 1, 6, 7)}
    with pytest.raises(ArtifactError, match="layer 0 keeps 3 experts of the router's group 0"):
        check_kept_map({0: [0, 1, 2, 7]}, grouped, "map")


def test_ids_may_come_in_any_order(facts: ModelFacts, tmp_path: Path) -> None:
    found = read_kept_map(written(tmp_path, {"0": [7, 1, 3]}), facts)
    assert found.kept == {0: (1, 3, 7)}
    assert (found.file, found.target.n_kept) == ("map.json", 3)
