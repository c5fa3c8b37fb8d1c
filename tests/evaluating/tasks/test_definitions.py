"""The hash of a task changes with its file, its data and its examples, and with nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from reap2gguf.evaluating.tasks.run import run_tasks
from reap2gguf.evaluating.tasks.spec import TaskSpec
from reap2gguf.progress import Silent
from tests.evaluating.tasks.task_folders import (
    choice,
    hash_scores,
    questions,
    write_data,
    write_task,
)
from tests.tiny import EXAMPLE


def written(folder: Path, first: int = 0, **changes: Any) -> Path:
    """Two tasks in a group; what changes is of the first one."""
    data = write_data(folder / "data", "alpha", questions(first=first))
    write_task(folder, "alpha", data, **{**choice("acc"), **changes})
    write_task(folder, "beta", write_data(folder / "data", "beta", questions()), **choice("acc"))
    metrics = [{"metric": "acc", "aggregation": "mean"}]
    group = {"group": "both", "task": ["alpha", "beta"], "aggregate_metric_list": metrics}
    (folder / "both.yaml").write_text(json.dumps(group))
    return folder


def definitions(folder: Path, **asked: Any) -> dict[str, str]:
    spec = TaskSpec(("both",), folder=folder, **asked)
    found = run_tasks(spec, EXAMPLE, hash_scores, ["source"], Silent())
    return {one.task: one.definition for one in found}


def changed(before: dict[str, str], after: dict[str, str]) -> set[str]:
    assert before.keys() == after.keys() == {"both", "alpha", "beta"}
    assert all(before.values())
    return {name for name in before if before[name] != after[name]}


def test_a_task_in_a_group_that_changes(tmp_path: Path) -> None:
    before = definitions(written(tmp_path / "tasks"))
    assert changed(before, definitions(written(tmp_path / "elsewhere"))) == set()
    for number, changes in enumerate(
        (
            {"first": 1},
            {"doc_to_text": "Asked: {{question}}"},
            {"doc_to_target": "{{0}}"},
            choice("acc_norm", "acc"),
            {"num_fewshot": 1},
        )
    ):
        folder = tmp_path / f"changed-{number}"
        assert changed(before, definitions(written(folder, **changes))) == {"alpha", "both"}
        # the same file, written again
        written(tmp_path / "tasks", **changes)
        assert changed(before, definitions(tmp_path / "tasks")) == {"alpha", "both"}
    assert changed(before, definitions(written(tmp_path / "tasks"), limit=3)) == set(before)
