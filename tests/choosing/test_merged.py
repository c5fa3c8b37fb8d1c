"""Candidates whose experts are merged: measured against whole models of transformers in float64."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import reap2gguf
from reap2gguf.artifacts.texts import ObservationRows
from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.choosing.measure import Chooser, Measurement
from reap2gguf.choosing.merged import Merging, check_group_size
from reap2gguf.choosing.names import check_candidates, criteria_of, merging_of
from reap2gguf.choosing.texts import MeasuredText, scored_half
from reap2gguf.errors import UsageError
from reap2gguf.evaluating.engine import evaluate_variants
from reap2gguf.evaluating.scores import Scores
from reap2gguf.merging.folder import MergeFolder
from reap2gguf.models.table import describe
from reap2gguf.options import BuildOptions, CalibrationOptions, ComputeOptions
from reap2gguf.progress import Silent
from reap2gguf.pruning.protection import Protection
from reap2gguf.pruning.select import Target
from reap2gguf.pruning.write import write_pruned
from tests.building.builds import PROSE
from tests.choosing.test_measure import log_probabilities
from tests.tiny import REPOSITORY, TinyQwen3Moe

CPU = ComputeOptions(device="cpu", threads=1)
CODE = REPOSITORY / "calibration" / "code.txt"
TEXTS = CalibrationOptions(str(PROSE), samples=6, max_length=64)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return TinyQwen3Moe(vocab=4096).write(tmp_path_factory.mktemp("merged") / "model")


def choose(model: Path, **changes: Any) -> reap2gguf.Choice:
    values: dict[str, Any] = {
        "keep_experts": 4,
        "text": CODE,
        "candidates": "hc_smoe,reap,ream",
        "group_size": 3,
        "calibration": TEXTS,
        "compute": CPU,
    }
    return reap2gguf.choose(model, **values | changes)


def test_figures_are_those_of_whole_merged_models(tmp_path: Path) -> None:
    folder = TinyQwen3Moe(dtype=torch.float32).write(tmp_path / "model")
    draw = np.random.default_rng(3)
    held = MeasuredText("held", [scored_half(draw.integers(0, 256, n)) for n in (24, 9, 31)])
    rows = ObservationRows("text", "rows", [draw.integers(0, 256, 40) for _ in range(4)])
    with Checkpoint.open(folder) as source, ExitStack() as stack:
        described = describe(source)
        methods = ("ream", "hc_smoe")
        merging = Merging.of(source, described, Target(8, 4), methods, 3, Protection())
        views, seconds = merging.views(rows, tmp_path / "work", CPU, stack, Silent())
        assert set(seconds) == set(methods)
        kept = {"first": dict.fromkeys(described.facts.moe_layers, (0, 1, 2, 3))}

        def evaluate(asked: Measurement) -> Scores:
            assert [one.name for one in asked.variants] == ["source", "first", *methods]
            return evaluate_variants(asked.variants, asked.rows, asked.pairs, CPU, Silent())

        found, _ = Chooser(source, described, kept, held, None, views).choose(evaluate, None)
        for name in methods:
            (tmp_path / name).mkdir()
            write_pruned(views[name], tmp_path / name, Silent())
    before = log_probabilities(folder, held)
    right = torch.from_numpy(np.concatenate([row.right for row in held.rows]))
    for name in methods:
        after = log_probabilities(tmp_path / name, held)
        divergence = float((before.exp() * (before - after)).sum(-1).mean())
        figures = found.candidate(name).held_out
        assert figures.divergence.value == pytest.approx(divergence, rel=2e-4)
        perplexity = float(torch.exp(-after.gather(1, right[:, None]).mean()))
        assert figures.perplexity.value == pytest.approx(perplexity, rel=1e-4)
        assert found.candidate(name).same_as is None


def test_merges_stand_in_the_table_of_the_criteria(model: Path) -> None:
    found = choose(model)
    assert [one.name for one in found.record.candidates] == ["reap", "hc_smoe", "ream"]
    assert found.group_size == 3
    assert {"hc_smoe", "ream"} < set(found.seconds)
    lowest = min(one.held_out.divergence.value for one in found.record.candidates)
    for one in found.record.candidates:
        behind = one.held_out.divergence.value - lowest
        assert one.held_out.behind.value == pytest.approx(behind, abs=1e-9)
    assert found.is_merged == (found.method != "reap")
    # the same figures as without them: all go through the layers together
    alone = choose(model, candidates="reap", group_size=None)
    assert alone.record.candidate("reap").held_out.divergence == (
        found.record.candidate("reap").held_out.divergence
    )


def test_groups_of_another_size_are_another_candidate(model: Path) -> None:
    sizes = [choose(model, candidates="reap,ream", group_size=size) for size in (2, 5)]
    figures = [one.record.candidate("ream").held_out.divergence.value for one in sizes]
    assert figures[0] != figures[1]


def test_an_interrupted_choice_goes_on_from_the_layers_that_are_merged(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, save, saved = tmp_path / "choice.json", MergeFolder.save, list[int]()

    def stop(self: MergeFolder, layer: int, *rest: Any) -> Any:
        if layer == 1:
            raise KeyboardInterrupt
        return save(self, layer, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(MergeFolder, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            choose(model, candidates="reap,ream", output=output)

    def count(self: MergeFolder, layer: int, *rest: Any) -> Any:
        saved.append(layer)
        return save(self, layer, *rest)

    monkeypatch.setattr(MergeFolder, "save", count)
    found = choose(model, candidates="reap,ream", output=output)
    assert saved == [1]
    assert found.record == choose(model, candidates="reap,ream").record
    assert json.loads(output.read_text())["group_size"] == 3
    assert [path.name for path in tmp_path.iterdir()] == ["choice.json"]


def test_merges_are_candidates_only_where_they_are_named() -> None:
    assert merging_of(check_candidates(None)) == merging_of(check_candidates("all")) == ()
    assert check_candidates("ream,best+repair,reap") == ("reap", "ream", "best+repair")
    assert criteria_of(("reap", "ream", "best+repair")) == ("reap",)
    with pytest.raises(UsageError, match="names no criterion"):
        check_candidates("ream,hc_smoe")


def test_a_build_says_where_merges_are_measured() -> None:
    with pytest.raises(UsageError, match="measure it with `reap2gguf choose`"):
        BuildOptions(recipes=("q8_0",), method="auto", candidates=("reap", "ream"))


@pytest.mark.parametrize(("size", "names"), [(1, ("ream",)), (True, ("ream",)), (4, ("hc_smoe",))])
def test_wrong_sizes_of_groups_are_refused(size: object, names: tuple[str, ...]) -> None:
    with pytest.raises(UsageError, match="group_size"):
        check_group_size(size, names)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"protect_super_experts": True}, "protect_super_experts does not go with"),
        ({"group_size": 2, "keep_experts": 3, "candidates": "reap,ream"}, "--group-size 2"),
    ],
)
def test_what_no_merge_is_made_for_is_refused(
    model: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        choose(model, **changes)
