"""What an evaluation measures, as one value.

A value that no evaluation can use is refused where it is made, with a UsageError.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from reap2gguf.bundle.evaluation import ENGINES
from reap2gguf.errors import UsageError
from reap2gguf.options import check_bool, check_choice, check_number, check_path

PROGRAM_SETS = ("humaneval", "humaneval+", "mbpp+")
FOLDER_ENGINES = ("transformers", "vllm", "none")


@dataclass(frozen=True)
class EvaluateOptions:
    """What is measured of a model and its variants; the arguments of `evaluate`."""

    text: str | None = "held-out"  # held-out, wikitext2 or a file; None: no text is scored
    chunk: int = 512  # tokens per chunk of the text, of which the second half is scored
    chunks: int | None = None  # the first ones; None: all
    tasks: tuple[str, ...] = ()  # of lm-eval: tasks, groups, tags and patterns
    limit: int | None = None  # the first questions of each task, or problems; None: all
    num_fewshot: int | None = None  # examples before each question; None: what a task says
    task_folder: Path | None = None  # of task files
    allow_task_code: bool = False  # whether files of that folder may run Python code
    engine: str = "streamed"  # what computes GGUF files: streamed or llama.cpp
    speed: bool = False  # whether llama.cpp's speed is measured, for each GGUF file
    smoke_test: bool = False  # whether answers of llama.cpp and transformers are compared
    # whether models write programs: of humaneval, humaneval+ and mbpp+
    programs: tuple[str, ...] = ()
    run_code: bool = False  # whether these programs are run, and judged
    allow_unsandboxed: bool = False  # also where this machine cannot isolate them
    generate_with: str = "transformers"  # what runs folders there: transformers, vllm or none

    def __post_init__(self) -> None:
        if self.text is not None:
            object.__setattr__(self, "text", str(check_path("text", self.text)))
        check_number("chunk", self.chunk, 8)
        if self.chunks is not None:
            check_number("chunks", self.chunks, 2)
        object.__setattr__(self, "tasks", _names("tasks", self.tasks))
        if self.limit is not None:
            check_number("limit", self.limit, 2)
        if self.num_fewshot is not None:
            check_number("num_fewshot", self.num_fewshot, 0)
        if self.task_folder is not None:
            object.__setattr__(self, "task_folder", check_path("task_folder", self.task_folder))
        for name in ("allow_task_code", "speed", "smoke_test", "run_code", "allow_unsandboxed"):
            check_bool(name, getattr(self, name))
        check_choice("engine", self.engine, ENGINES)
        object.__setattr__(self, "programs", _names("programs", self.programs))
        for name in self.programs:
            check_choice("programs", name, PROGRAM_SETS)
        check_choice("generate_with", self.generate_with, FOLDER_ENGINES)
        self._check_together()

    def _check_together(self) -> None:
        """Refuse options without effect, and an evaluation of nothing."""
        if not self.tasks:
            for name in ("num_fewshot", "task_folder", "allow_task_code"):
                if getattr(self, name) not in (None, False):
                    raise UsageError(f"--{name.replace('_', '-')} is for tasks; pass --tasks")
        if not (self.tasks or self.programs) and self.limit is not None:
            raise UsageError("--limit is for tasks and programs; for a text there is --chunks")
        if not self.programs and (self.run_code or self.allow_unsandboxed):
            raise UsageError(
                "--run-code is for programs that models write; pass --humaneval or --evalplus"
            )
        measured = self.tasks, self.programs, self.speed, self.smoke_test
        if self.text is None and not any(measured):
            raise UsageError(
                "nothing is measured; pass --tasks, --speed, --smoke-test or --humaneval, or a text"
            )

    @property
    def needs_llama(self) -> bool:
        """Whether llama.cpp computes anything, besides the programs that it writes."""
        return self.engine == "llama.cpp" or self.speed or self.smoke_test


def _names(what: str, given: object) -> tuple[str, ...]:
    """Names, each once, from a list or a text with commas."""
    parts = given.split(",") if isinstance(given, str) else given
    if not isinstance(parts, Iterable) or isinstance(parts, bytes):
        raise UsageError(f"{what} is {given!r}, expected names")
    found = tuple(parts)
    if not all(isinstance(part, str) and part.strip() for part in found):
        raise UsageError(f"{what} is {given!r}, expected names with commas between them")
    return tuple(dict.fromkeys(part.strip() for part in found))
