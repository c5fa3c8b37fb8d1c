"""Options of an evaluation that cannot be are refused where they are made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from reap2gguf.errors import UsageError
from reap2gguf.evaluating.generation.generators import FOLDER_ENGINES as ENGINES
from reap2gguf.evaluating.generation.problems import SET_NAMES
from reap2gguf.evaluating.options import FOLDER_ENGINES, PROGRAM_SETS, EvaluateOptions


def test_values_are_as_they_are_used() -> None:
    options = EvaluateOptions(tasks="mmlu, arc_easy,mmlu", task_folder="x", text=Path("a.txt"))  # type: ignore[arg-type]
    assert options.tasks == ("mmlu", "arc_easy")
    assert options.task_folder == Path("x")
    assert options.text == "a.txt"
    assert not options.needs_llama
    assert EvaluateOptions(speed=True).needs_llama
    assert PROGRAM_SETS == SET_NAMES
    assert (*ENGINES, "none") == FOLDER_ENGINES


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"text": None}, "nothing is measured"),
        ({"chunk": 7}, "chunk is 7"),
        ({"chunks": 1}, "chunks is 1"),
        ({"tasks": "a,,b"}, "expected names with commas"),
        ({"tasks": 3}, "tasks is 3, expected names"),
        ({"limit": 5}, "--limit is for tasks and programs"),
        ({"tasks": ("a",), "limit": 1}, "limit is 1"),
        ({"num_fewshot": 2}, "--num-fewshot is for tasks"),
        ({"task_folder": "x"}, "--task-folder is for tasks"),
        ({"allow_task_code": True}, "--allow-task-code is for tasks"),
        ({"run_code": True}, "--run-code is for programs"),
        ({"engine": "vllm"}, "engine is 'vllm'"),
        ({"programs": ("mbpp",)}, "programs is 'mbpp'"),
        ({"generate_with": "x"}, "generate_with is 'x'"),
        ({"speed": 1}, "speed is 1, expected True or False"),
    ],
)
def test_values_that_cannot_be(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        EvaluateOptions(**values)
