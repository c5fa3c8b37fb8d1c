from __future__ import annotations

from pathlib import Path

import pytest

from reap2gguf.errors import EvaluationError
from reap2gguf.evaluating.tasks.task_files import broken_files, check_no_code, read_task_file

METRICS = ("acc", "acc_norm")


def write(folder: Path, text: str, name: str = "task.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_plain_files_pass(tmp_path: Path) -> None:
    write(tmp_path, "doc_to_text: '{{q}}'\nunsafe_code: false\n", "_base")
    text = "task: a\ninclude: _base\nmetric_list: [{metric: acc}]\nlist: &x [1, *x]\n"
    check_no_code(write(tmp_path, text), METRICS)
    group = "group: g\ntask: [a]\naggregate_metric_list: [{metric: own, weight_by_size: true}]\n"
    check_no_code(write(tmp_path, group, "group.yaml"), METRICS)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("doc_to_text: !function utils.f", "!function 'utils.f'"),
        ("group: g\ntask: [{task: a, process_docs: !function os.system}]", "'os.system'"),
        ("class: !function x.Y", "`class`"),
        ("class: x.Y", "`class`"),
        ("unsafe_code: true", "`unsafe_code`"),
        ("unsafe_code: 'no'", "`unsafe_code`"),
        ("dataset_kwargs: {trust_remote_code: true}", "`trust_remote_code`"),
        ("metric_list: [{metric: acc, hf_evaluate: true}]", "`hf_evaluate`"),
        ("metric_list: [{metric: someone/metric}]", "the metric 'someone/metric'"),
        ("use_prompt: evil.yaml:all", "`use_prompt`"),
        ("custom_dataset: x", "`custom_dataset`"),
    ],
)
def test_all_that_runs_code_is_found(tmp_path: Path, text: str, words: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(EvaluationError, match="--allow-task-code") as found:
        check_no_code(path, METRICS)
    assert words in str(found.value)
    outer = write(tmp_path, "task: b\ninclude: [task.yaml]", "outer.yaml")
    with pytest.raises(EvaluationError, match=r"task\.yaml: runs code"):
        check_no_code(outer, METRICS)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("task: [", "not a task file in YAML"),
        ("- a\n- b", "holds a list, expected the keys of a task"),
        ("a: !!python/object/apply:os.system [ls]", "not a task file in YAML"),
        ("task: \x01", "not a task file in YAML"),
        ("include: nowhere.yaml", "nowhere.yaml: cannot be read"),
        ("include: {a: 1}", "includes {'a': 1}, expected names of files"),
        ("task: 5", "`task` is 5, expected a name; put it in quotes"),
        ("tag: {a: 1}", "`tag` is {'a': 1}, expected a name; put it in quotes"),
        ("[" * 1100, "not a task file in YAML"),
        ("a: " + "x" * 2**20, "is this a task file"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, text: str, words: str) -> None:
    path = write(tmp_path, text)
    (found,) = broken_files(tmp_path)
    assert words in str(found)
    assert str(tmp_path) in str(found)
    with pytest.raises(EvaluationError):
        check_no_code(path, METRICS)


def test_files_that_include_each_other_are_read_once(tmp_path: Path) -> None:
    path = write(tmp_path, "include: task.yaml")
    check_no_code(path, METRICS)
    assert read_task_file(path) == {"include": "task.yaml"}
    for number in range(70):
        write(tmp_path, f"include: {number + 1}.yaml", f"{number}.yaml")
    with pytest.raises(EvaluationError, match="more than 64 files"):
        check_no_code(tmp_path / "0.yaml", METRICS)
