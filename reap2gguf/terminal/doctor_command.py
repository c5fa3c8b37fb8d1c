"""`reap2gguf doctor`: check this machine."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from reap2gguf.progress import working
from reap2gguf.terminal.click_options import (
    json_option,
    output_options,
)
from reap2gguf.terminal.compute_options import (
    llama_cpp_option,
)
from reap2gguf.terminal.console import say, say_json, screen_progress
from reap2gguf.terminal.help import command

if TYPE_CHECKING:
    from reap2gguf.doctor import Finding

_MARKS = {"ok": "+", "absent": "-", "advice": "!", "problem": "x"}
_COLOURS = {"ok": "green", "absent": "bright_black", "advice": "yellow", "problem": "red"}


@command()
@llama_cpp_option
@json_option
@output_options
def doctor(as_json: bool) -> None:
    """Check GPU, RAM, disk, llama.cpp, Hub login.

    `+` is fine, `-` is missing but not needed, `!` could be better, `x` is needed and missing.
    Exits with 2 if something needed is missing.

    \b
    Example:
      reap2gguf doctor
      reap2gguf doctor --llama-cpp ~/llama.cpp
    """
    from reap2gguf.doctor import diagnose

    findings: list[Finding] = []
    last = ""
    for heading, finding in _announced(diagnose()):
        findings.append(finding)
        if as_json:
            continue
        if heading != last:
            if last:
                say("", "result")
            say(heading, "result")
            last = heading
        _say_finding(finding)
    problems = [finding for finding in findings if finding.is_problem]
    if as_json:
        entries = [
            {"what": f.what, "state": f.state.value, "found": f.found, "advice": f.advice}
            for f in findings
        ]
        say_json({"ok": not problems, "findings": entries})
    else:
        names = ", ".join(finding.what for finding in problems)
        say("", "result")
        say(f"Needed and missing: {names}" if problems else "Nothing needed is missing.", "result")
    sys.exit(2 if problems else 0)


def _announced(found: Iterator[tuple[str, Finding]]) -> Iterator[tuple[str, Finding]]:
    """The same, with a line on a terminal while something is looked at: torch loads slowly."""
    progress = screen_progress()
    while True:
        with working(progress, "Checking"):
            one = next(found, None)
        if one is None:
            return
        yield one


def _say_finding(finding: Finding) -> None:
    state = finding.state.value
    mark = click.style(_MARKS[state], fg=_COLOURS[state])
    say(f"{finding.what:<24} {finding.found}", "result", prefix=f"  {mark} ")
    if finding.advice:
        say(f"  {'':<26} {finding.advice}", "result")
