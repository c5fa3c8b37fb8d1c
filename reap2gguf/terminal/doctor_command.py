"""`reap2gguf doctor`: what this machine has for the work."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

import click

from reap2gguf.messages import one_line
from reap2gguf.terminal.options import llama_cpp_option

if TYPE_CHECKING:
    from reap2gguf.doctor import Finding

_MARKS = {"ok": "+", "absent": "-", "advice": "!", "problem": "x"}
_COLOURS = {"ok": "green", "absent": "bright_black", "advice": "yellow", "problem": "red"}


@click.command()
@llama_cpp_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(as_json: bool) -> None:
    """Say what this machine has for the work, and what is missing; exit 2 if something needed is.

    `+` is there, `-` is not there and not needed, `!` could be better, `x` is needed and missing.

    \b
    Example:
      reap2gguf doctor
      reap2gguf doctor --llama-cpp ~/llama.cpp
    """
    from reap2gguf.doctor import diagnose

    findings: list[Finding] = []
    last = ""
    for heading, finding in diagnose():
        findings.append(finding)
        if as_json:
            continue
        if heading != last:
            click.echo(f"{heading}" if not last else f"\n{heading}")
            last = heading
        _print(finding)
    problems = [finding for finding in findings if finding.is_problem]
    if as_json:
        entries = [
            {"what": f.what, "state": f.state.value, "found": f.found, "advice": f.advice}
            for f in findings
        ]
        click.echo(json.dumps({"ok": not problems, "findings": entries}, indent=1))
    else:
        names = ", ".join(finding.what for finding in problems)
        click.echo(
            f"\nNeeded and missing: {names}" if problems else "\nAll that is needed is here."
        )
    sys.exit(2 if problems else 0)


def _print(finding: Finding) -> None:
    state = finding.state.value
    mark = click.style(_MARKS[state], fg=_COLOURS[state])
    click.echo(f"  {mark} {finding.what:<24} {one_line(finding.found)}")
    if finding.advice:
        click.echo(f"  {'':<26} {one_line(finding.advice)}")
