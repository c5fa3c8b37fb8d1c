"""Whole runs against lm-eval's own model `hf`, and groups against lm-eval's own aggregation."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from reap2gguf.bundle.evaluation import TaskScore
from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.evaluating.engine import evaluate_variants
from reap2gguf.evaluating.scores import ScoredRow, Scores
from reap2gguf.evaluating.tasks.encoding import Encoded, encode, encoder_of
from reap2gguf.evaluating.tasks.harness import harness
from reap2gguf.evaluating.tasks.loading import load_tasks
from reap2gguf.evaluating.tasks.replay import answers_of
from reap2gguf.evaluating.tasks.run import run_tasks
from reap2gguf.evaluating.tasks.spec import TaskSpec
from reap2gguf.evaluating.variants import Variant
from reap2gguf.models.table import describe
from reap2gguf.options import ComputeOptions
from reap2gguf.progress import CallbackProgress, ProgressEvent, Silent
from tests.evaluating.tasks.task_folders import (
    Scorer,
    choice,
    hash_scores,
    lm_eval_results,
    load,
    questions,
    write_data,
    write_pruned_copy,
    write_task,
    write_three_tasks,
)
from tests.tiny import EXAMPLE, TinyQwen3Moe, TinyQwen35Moe

NAMES = ("plain", "normed", "rolling")


class Remembering:
    """A scorer that keeps what it found."""

    def __init__(self, score: Callable[[Sequence[ScoredRow]], Scores]) -> None:
        self._score = score
        self.scores = Scores((), {})
        self.n_calls = 0

    def __call__(self, rows: Sequence[ScoredRow]) -> Scores:
        self.n_calls += 1
        self.scores = self._score(rows)
        return self.scores


def compare(
    folders: dict[str, Path],
    tasks: Path,
    max_length: int | None,
    patch: pytest.MonkeyPatch,
    score: Callable[[Sequence[ScoredRow]], Scores] | None = None,
) -> None:
    """Hold every answer and every score beside those of lm-eval's own model."""
    models = {name: load(folder) for name, folder in folders.items()}
    spec = TaskSpec(NAMES, folder=tasks, max_length=max_length)
    scorer = Remembering(score or Scorer(models))
    found = run_tasks(spec, folders["source"], scorer, list(models), Silent())
    assert scorer.n_calls == 1
    with harness(allows_code=False):
        loaded, encoded = load_tasks(spec, Silent()), Encoded()
        encoder = encoder_of(folders["source"], max_length)
        for name, task in loaded.tasks.items():
            task.build_all_requests()
            encode(encoder, name, task.instances, encoded)
    encoded.sort()
    scores = replace(scorer.scores, rows=encoded.rows)
    for row, scored in zip(encoded.rows, scorer.scores.rows, strict=True):
        assert (row.first, row.tokens.tolist()) == (scored.first, scored.tokens.tolist())
    for name, model in models.items():
        theirs = lm_eval_results(
            model, folders["source"], tasks, NAMES, patch, max_length=max_length
        )
        answers = answers_of(encoded, scores, name)
        for item in (one for task in NAMES for one in theirs["samples"][task]):
            for texts, (answer,) in zip(item["arguments"], item["resps"], strict=True):
                check_answer(encoded, answers, texts, answer)
        check_scores(found, name, theirs)


def check_answer(
    encoded: Encoded, answers: Sequence[tuple[float, bool]], texts: tuple[str, ...], theirs: Any
) -> None:
    kind = "loglikelihood" if len(texts) == 2 else "loglikelihood_rolling"
    numbers = encoded.answers[kind, tuple(texts)]
    found = sum(answers[number][0] for number in numbers)
    if kind == "loglikelihood":
        assert answers[numbers[0]][1] == theirs[1]
        theirs = theirs[0]
    assert found == pytest.approx(theirs, abs=1e-3)


def check_scores(found: Sequence[TaskScore], variant: str, theirs: dict[str, Any]) -> None:
    """All metrics and the standard errors that lm-eval gives; shares are exactly the same."""
    ours = {(one.task, one.metric): one for one in found if one.variant == variant}
    n_checked = 0
    for name, results in theirs["results"].items():
        for key, value in results.items():
            metric, comma, _ = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            score = ours[name, metric]
            n_checked += 1
            assert score.score.value == pytest.approx(value, rel=1e-4 if "acc" not in metric else 0)
            error = results[f"{metric}_stderr,none"]
            if error != "N/A":
                assert score.score.error == pytest.approx(error, rel=1e-12)
            assert score.n_items == results["sample_len"]
    assert n_checked == len(ours) > 0


def test_answers_and_scores_are_those_of_lm_eval(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pruned = write_pruned_copy(EXAMPLE, tmp_path / "pruned", 12)
    folders = {"source": EXAMPLE, "pruned": pruned}
    compare(folders, write_three_tasks(tmp_path / "tasks"), None, monkeypatch)


def test_long_questions_and_texts_are_cut_as_by_lm_eval(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = TinyQwen3Moe().write(tmp_path / "source")
    pruned = write_pruned_copy(source, tmp_path / "pruned", 6)
    folders = {"source": source, "pruned": pruned}
    compare(folders, write_three_tasks(tmp_path / "tasks"), 24, monkeypatch)


def test_streamed_scores_give_the_same_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The source, and its pruned folder, by the engine that streams layers."""
    source = TinyQwen3Moe().write(tmp_path / "source")
    pruned = write_pruned_copy(source, tmp_path / "pruned", 6)
    tasks = write_three_tasks(tmp_path / "tasks")
    with Checkpoint.open(source) as whole, Checkpoint.open(pruned) as smaller:
        variants = [
            Variant("source", "source", whole, describe(whole), 0, 16.0),
            Variant("pruned", "pruned", smaller, describe(smaller), 0, 16.0),
        ]
        options = ComputeOptions(device="cpu", dtype="float32", threads=1)

        def score(rows: Sequence[ScoredRow]) -> Scores:
            return evaluate_variants(variants, rows, (), options, Silent())

        compare({"source": source, "pruned": pruned}, tasks, 64, monkeypatch, score)


@pytest.mark.slow
def test_the_other_architecture_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = TinyQwen35Moe().write(tmp_path / "source")
    pruned = write_pruned_copy(source, tmp_path / "pruned", 6)
    folders = {"source": source, "pruned": pruned}
    compare(folders, write_three_tasks(tmp_path / "tasks"), 64, monkeypatch)


def write_groups(folder: Path) -> dict[str, list[str]]:
    """57 subjects of unequal sizes in four groups of one group, as MMLU; subjects by group."""
    groups: dict[str, list[str]] = {name: [] for name in ("stem", "other", "social", "humanities")}
    for number in range(57):
        name, group = f"subject_{number:02d}", list(groups)[number % 4]
        groups[group].append(name)
        data = write_data(folder / "data", name, questions(2 + number % 3, number))
        write_task(folder, name, data, **choice("acc"), tag=f"{group}_tasks")
    listed = [{"metric": "acc", "weight_by_size": True}]
    for group in groups:
        values = {"group": group, "task": [f"{group}_tasks"], "aggregate_metric_list": listed}
        (folder / f"{group}.yaml").write_text(repr(values).replace("True", "true"))
    whole = {"group": "all", "task": list(groups), "aggregate_metric_list": listed}
    (folder / "all.yaml").write_text(repr(whole).replace("True", "true"))
    return groups


def test_groups_in_groups_are_aggregated_as_by_lm_eval(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = TinyQwen3Moe(n_layers=1).write(tmp_path / "source")
    groups = write_groups(tmp_path / "tasks")
    model = load(source)
    spec = TaskSpec(("all",), folder=tmp_path / "tasks")
    found = run_tasks(spec, source, Scorer({"source": model}), ["source"], Silent())
    theirs = lm_eval_results(model, source, tmp_path / "tasks", ["all"], monkeypatch)
    check_scores(found, "source", theirs)
    scores = {one.task: one for one in found}
    assert len(scores) == len(found) == 1 + 4 + 57
    assert [one.task for one in found[:2]] == ["all", "stem"]
    assert scores["all"].group == ""
    assert scores["stem"].group == "all"
    for group, subjects in groups.items():
        ones = [scores[subject] for subject in subjects]
        assert {one.group for one in ones} == {group}
        n_right = sum(one.score.value * one.n_items for one in ones)
        n_items = sum(one.n_items for one in ones)
        assert scores[group].n_items == n_items
        assert scores[group].score.value == pytest.approx(n_right / n_items)
    assert scores["all"].n_items == sum(scores[group].n_items for group in groups)


def test_examples_before_questions_are_those_of_lm_eval(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are drawn at random; and the limit takes the first questions."""
    source = TinyQwen3Moe().write(tmp_path / "source")
    tasks = write_three_tasks(tmp_path / "tasks")
    model = load(source)
    spec = TaskSpec(("plain", "normed"), limit=3, n_shots=1, folder=tasks)
    found = run_tasks(spec, source, Scorer({"source": model}), ["source"], Silent())
    theirs = lm_eval_results(
        model, source, tasks, ["plain", "normed"], monkeypatch, limit=3, num_fewshot=1
    )
    check_scores(found, "source", theirs)
    assert {(one.n_items, one.n_shots) for one in found} == {(3, 1)}


def test_nothing_is_printed_changed_or_written(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = TinyQwen3Moe(n_layers=1).write(tmp_path / "source")
    tasks = write_three_tasks(tmp_path / "tasks")
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    environment, state = dict(os.environ), random.getstate()
    levels = {name: logging.getLogger(name).level for name in ("lm_eval", "datasets")}
    events: list[ProgressEvent] = []

    def score(rows: Sequence[ScoredRow]) -> Scores:
        return hash_scores(rows, ["source", "pruned"])

    spec = TaskSpec(NAMES, folder=tasks, max_length=32)
    found = run_tasks(spec, source, score, ["source", "pruned"], CallbackProgress(events.append))
    assert capfd.readouterr() == ("", "")
    assert sorted(tmp_path.rglob("*")) == before
    assert dict(os.environ) == environment
    assert random.getstate() == state
    assert {name: logging.getLogger(name).level for name in levels} == levels
    assert {event.title for event in events if event.kind == "end"} == {
        "Finding tasks", "Loading tasks", "Writing questions", "Scoring tasks",
    }  # fmt: skip
    notes = [event.text for event in events if event.kind == "note"]
    assert any(note.startswith("normed: the beginning of ") for note in notes)
    assert "rows of" in notes[-1]
    assert notes[-1].startswith("41 answers of 3 tasks are ")
    assert [one.variant for one in found] == ["source"] * 6 + ["pruned"] * 6


def test_one_question_is_one_row_however_often_it_is_asked(tmp_path: Path) -> None:
    source = TinyQwen3Moe(n_layers=1).write(tmp_path / "source")
    data = write_data(tmp_path / "tasks" / "data", "questions", questions())
    for name in ("one", "same"):
        write_task(tmp_path / "tasks", name, data, **choice("acc"))
    seen: list[int] = []

    def score(rows: Sequence[ScoredRow]) -> Scores:
        seen.append(len(rows))
        return hash_scores(rows)

    spec = TaskSpec(("one", "same"), folder=tmp_path / "tasks")
    found = run_tasks(spec, source, score, ["source"], Silent())
    assert seen == [sum(len(one["choices"]) for one in questions())]
    assert found[0].score == found[1].score
