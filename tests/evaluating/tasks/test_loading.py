from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from reap2gguf.errors import DependencyError, EvaluationError, Reap2ggufError, UsageError
from reap2gguf.evaluating.tasks.harness import harness
from reap2gguf.evaluating.tasks.loading import Loaded, load_tasks
from reap2gguf.evaluating.tasks.spec import TaskSpec
from reap2gguf.progress import CallbackProgress, ProgressEvent, Silent
from tests.evaluating.tasks.task_folders import (
    choice,
    only_own_tasks,
    questions,
    write_data,
    write_task,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    data = write_data(tmp_path / "data", "questions", questions())
    write_task(tmp_path, "first", data, **choice("acc"), tag="both")
    write_task(tmp_path, "second", data, **choice("acc"), tag="both")
    return tmp_path


def load(folder: Path, *names: str, **options: Any) -> Loaded:
    with harness(allows_code=options.get("allows_code", False)):
        return load_tasks(TaskSpec(names, folder=folder, **options), Silent())


def refused(error: type[Reap2ggufError], folder: Path, *names: str) -> str:
    with pytest.raises(error) as found:
        load(folder, *names)
    assert "\n" not in str(found.value)
    return str(found.value)


def write_group(folder: Path, name: str, members: list[Any], **values: Any) -> None:
    config = {"group": name, "task": members, **values}
    (folder / f"{name}.yaml").write_text(json.dumps(config))


def test_names_patterns_tags_and_groups(folder: Path) -> None:
    write_group(folder, "pair", ["first", {"task": "second", "num_fewshot": 1}])
    write_group(folder, "outer", ["pair"])
    assert list(load(folder, "first").tasks) == ["first"]
    assert list(load(folder, "fir*", "second").tasks) == ["first", "second"]
    assert list(load(folder, "both").tasks) == ["first", "second"]
    found = load(folder, "outer")
    assert found.tasks["second"].config.num_fewshot == 1
    expected = [("outer", ""), ("pair", "outer"), ("first", "pair"), ("second", "pair")]
    assert found.in_order() == expected


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch) -> None:
    only_own_tasks(monkeypatch, "gsm8k", "arc")


@pytest.mark.usefixtures("index")
def test_an_unknown_task_has_near_names(folder: Path) -> None:
    words = refused(UsageError, folder, "arc_eazy")
    assert "'arc_eazy': no such task in lm-eval" in words
    assert "did you mean arc_easy" in words
    assert "lists all" in refused(UsageError, folder, "zzzzzzzzzzzz")
    with (
        pytest.raises(UsageError, match=r"no such task in lm-eval; did you mean"),
        harness(allows_code=False),
    ):
        load_tasks(TaskSpec(("arc_esy",)), Silent())


@pytest.mark.usefixtures("index")
def test_a_broken_file_is_named_where_a_task_is_missing(folder: Path) -> None:
    (folder / "third.yaml").write_text("task: third\n  dataset: [")
    words = refused(EvaluationError, folder, "third")
    assert "'third': no such task" in words
    assert "third.yaml: not a task file in YAML" in words
    assert list(load(folder, "first").tasks) == ["first"]  # others can be used


@pytest.mark.usefixtures("index")
@pytest.mark.parametrize("named", ["first", "gsm8k"])
def test_a_number_for_a_name(folder: Path, named: str) -> None:
    (folder / "third.yaml").write_text("task: 5\ndataset_path: json\n")
    words = refused(EvaluationError, folder, named)
    assert "third.yaml: `task` is 5, expected a name; put it in quotes" in words


@pytest.mark.usefixtures("index")
def test_tasks_that_generate_are_refused_before_anything_is_fetched(folder: Path) -> None:
    words = refused(EvaluationError, folder, "first", "gsm8k")
    assert words.startswith("gsm8k: the model has to write text")
    assert "leave it out" in words
    write_group(folder, "mixed", ["first", {"task": "second", "output_type": "generate_until"}])
    assert refused(EvaluationError, folder, "mixed").startswith("second: the model has to write")


@pytest.mark.usefixtures("index")
def test_a_data_set_that_cannot_be_fetched(folder: Path) -> None:
    """Tests run without a network: HF_HUB_OFFLINE is set."""
    words = refused(EvaluationError, folder, "arc_easy")
    assert "arc_easy: its data set is not in the cache and HF_HUB_OFFLINE is set" in words


@pytest.mark.usefixtures("index")
def test_a_member_that_is_nowhere(folder: Path) -> None:
    write_group(folder, "lost", ["first", "nowhere"])
    assert refused(EvaluationError, folder, "lost").startswith("nowhere: named by a group")
    write_group(folder, "ring", ["ring"])
    assert "groups hold each other" in refused(EvaluationError, folder, "ring")


def test_a_task_in_two_groups_is_refused(folder: Path) -> None:
    write_group(folder, "one", ["first"])
    words = refused(UsageError, folder, "one", "both")
    assert words == "the task first is part of one and of both; name one of them"


def test_a_missing_file_of_data(folder: Path) -> None:
    write_task(folder, "third", folder / "gone.jsonl", **choice("acc"))
    words = refused(EvaluationError, folder, "third")
    assert "third.yaml): a file of its data set is missing" in words
    assert "gone.jsonl" in words


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"metric_list": [{"no": 1}]}, "not a task that lm-eval can build (ValueError: 'metric'"),
        ({"unknown_key": 1}, "not a task that lm-eval can build (TypeError"),
        ({"doc_to_text": "{{missing}}"}, "'missing' is undefined"),
        ({"doc_to_text": "{{ ''.__class__ }}"}, "access to attribute '__class__'"),
        ({"doc_to_image": "question"}, "asks about images or sound"),
        ({"test_split": "train"}, "not a task that lm-eval can build (KeyError"),
    ],
)
def test_a_task_that_cannot_be_built(folder: Path, values: dict[str, Any], words: str) -> None:
    data = folder / "data" / "questions.jsonl"
    write_task(folder, "third", data, **{**choice("acc"), **values})
    assert words in refused(EvaluationError, folder, "third")


def test_code_of_the_folder_runs_only_if_allowed(folder: Path) -> None:
    (folder / "words.py").write_text(
        "from pathlib import Path\nPath(__file__).with_suffix('.ran').touch()\n"
        "def text(doc): return 'Asked: ' + doc['question']\n"
    )
    path = write_task(folder, "third", folder / "data" / "questions.jsonl", **choice("acc"))
    text = path.read_text().replace('"Question: {{question}}"', "!function words.text")
    path.write_text(text)
    assert "runs code (!function 'words.text')" in refused(EvaluationError, folder, "third")
    write_group(folder, "inside", ["third"])
    assert "third.yaml: runs code" in refused(EvaluationError, folder, "inside")
    assert list(load(folder, "first").tasks) == ["first"]
    assert not (folder / "words.ran").exists()
    (task,) = load(folder, "third", allows_code=True).tasks.values()
    assert task.doc_to_text({"question": "x"}) == "Asked: x"
    path.write_text(text.replace("words.text", "missing_package.text"))
    with pytest.raises(DependencyError, match="needs the Python package missing_package"):
        load(folder, "third", allows_code=True)


def test_shots_that_a_task_fixes_are_left_and_noted(folder: Path) -> None:
    data = folder / "data" / "questions.jsonl"
    write_task(folder, "fixed", data, **choice("acc"), num_fewshot=0)
    events: list[ProgressEvent] = []
    with harness(allows_code=False):
        spec = TaskSpec(("first", "fixed"), n_shots=2, folder=folder)
        found = load_tasks(spec, CallbackProgress(events.append))
    assert {name: task.config.num_fewshot for name, task in found.tasks.items()} == {
        "first": 2,
        "fixed": 0,
    }
    (note,) = (event.text for event in events if event.kind == "note")
    assert note == "fixed: asked without examples, since the task itself says 0"
