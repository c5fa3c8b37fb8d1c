from __future__ import annotations

from pathlib import Path

import pytest

from reap2gguf.errors import UsageError
from reap2gguf.evaluating.tasks.spec import TaskSpec


def test_a_list_of_names_has_each_once() -> None:
    spec = TaskSpec.of("mmlu, arc_easy,mmlu,", limit=250)
    assert (spec.names, spec.limit, spec.n_shots) == (("mmlu", "arc_easy"), 250, None)


@pytest.mark.parametrize(
    ("names", "options", "words"),
    [
        (" , ", {}, "no tasks are named"),
        ("a", {"limit": 1}, r"the limit of tasks is 1, expected 2 to .*no standard error"),
        ("a", {"limit": -5}, "limit of tasks is -5"),
        ("a", {"n_shots": -1}, "number of few-shot examples of tasks is -1, expected 0 to 1,000"),
        ("a", {"max_length": 1}, "longest row of tasks is 1, expected 2"),
        ("a", {"folder": Path("nowhere")}, "nowhere: no such folder"),
    ],
)
def test_values_that_cannot_be_are_refused(
    names: str, options: dict[str, int | Path], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        TaskSpec.of(names, **options)
