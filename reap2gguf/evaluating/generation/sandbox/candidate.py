"""The process that runs a program of a model; `checking.py` starts it, `judge.py` asks it.

It gets the program on its standard input, gives up its rights, says on its standard output which
guards hold, and ends there if they do not suffice. Then it runs the program, and answers calls of
the function until the judge ends. It knows no tests and no expected values: there is nothing here
to forge. Standard library alone.
"""

from __future__ import annotations

import json
import os
import sys
import types
from typing import Any

from reap2gguf.evaluating.generation.sandbox import jail, values

NAME = "answer"  # of the program's module


def main() -> None:
    """Run what standard input describes; the arguments are the pipes from and to the judge."""
    requests, answers = int(sys.argv[1]), int(sys.argv[2])
    setup = json.load(sys.stdin)
    sys.path += setup["packages"]
    guards = jail.enter(setup)
    os.write(1, json.dumps(guards).encode() + b"\n")
    if not set(setup["required"]) <= set(guards):
        os._exit(0)
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nothing, descriptor)
    _serve(setup, requests, answers)


def _serve(setup: dict[str, Any], requests: int, answers: int) -> None:
    module = types.ModuleType(NAME)
    sys.modules[NAME] = module
    try:
        exec(compile(setup["code"], f"<{NAME}>", "exec"), module.__dict__)
        if setup["entry_point"] not in module.__dict__:
            raise NameError(f"it defines no {setup['entry_point']}")
        function = module.__dict__[setup["entry_point"]]
    except BaseException as error:  # noqa: BLE001 - a program can raise anything
        _write(answers, _failure(error))
        return
    _write(answers, ["loaded", None])
    while (request := values.read_frame(requests)) is not None:
        _write(answers, _answer(function, request))


def _answer(function: Any, request: Any) -> Any:
    try:
        positional, named = values.decode(request)
        return ["value", values.encode(function(*positional, **named))]
    except BaseException as error:  # noqa: BLE001 - a program can raise anything
        return _failure(error)


def _failure(error: BaseException) -> Any:
    try:
        text = str(error)[:200]
    except BaseException:  # noqa: BLE001 - its text is the program's, too
        text = ""
    return ["error", [type(error).__name__[:100], text]]


def _write(descriptor: int, message: Any) -> None:
    try:
        data = values.frame(message)
    except BaseException as error:  # noqa: BLE001 - nested too deeply, too long, out of memory
        data = values.frame(_failure(error))
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
