"""Which tasks are evaluated, and on how many questions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from reap2gguf.errors import UsageError
from reap2gguf.messages import shown

FEWEST = 2  # questions: one has no standard error
_MOST_SHOTS = 1000
_SHORTEST = 2  # tokens: one predicts the other


@dataclass(frozen=True)
class TaskSpec:
    """Tasks by name, and how they are asked. Raises UsageError for values that cannot be."""

    names: tuple[str, ...]  # of tasks, groups and tags; patterns such as mmlu_* too
    limit: int | None = None  # questions of each task, the first ones; None: all
    n_shots: int | None = None  # examples before each question; None: what each task says
    folder: Path | None = None  # of task files; they replace lm-eval's own of the same name
    allows_code: bool = False  # whether files of the folder may run Python code
    max_length: int | None = None  # tokens before the last one; None: what the model says

    def __post_init__(self) -> None:
        if not self.names or not all(self.names):
            raise UsageError("no tasks are named, expected some, such as arc_easy,hellaswag")
        _check("limit", self.limit, FEWEST, 2**31, "one question has no standard error")
        _check("number of few-shot examples", self.n_shots, 0, _MOST_SHOTS, "more fit nowhere")
        _check("longest row", self.max_length, _SHORTEST, 2**31, "tokens predict the next one")
        if self.folder is not None and not self.folder.is_dir():
            raise UsageError(
                f"{self.folder}: no such folder, expected one with task files (*.yaml)"
            )

    @classmethod
    def of(cls, names: str, **options: int | bool | Path | None) -> TaskSpec:
        """The tasks of a list such as `mmlu,arc_easy`, each once."""
        found = dict.fromkeys(name.strip() for name in names.split(","))
        return cls(tuple(name for name in found if name), **options)  # type: ignore[arg-type]


def _check(what: str, value: int | None, lowest: int, highest: int, reason: str) -> None:
    if value is not None and not lowest <= value <= highest:
        raise UsageError(
            f"the {what} of tasks is {shown(value)}, expected {lowest:,} to {highest:,} ({reason})"
        )
