"""A whole `build` command given as arguments of another command, read as `build` reads it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import reap2gguf
from reap2gguf.errors import UsageError
from reap2gguf.terminal.build_commands import build
from reap2gguf.terminal.click_options import collect
from reap2gguf.terminal.console import terminal_progress

if TYPE_CHECKING:
    from reap2gguf.building.plan import Plan

_ONLY_THERE = "the job chooses its own"


def build_arguments(words: tuple[str, ...], *, for_elsewhere: bool) -> dict[str, Any]:
    """The arguments of the `build` command in `words`, checked as `build` checks them.

    Raises UsageError for anything else; with `for_elsewhere` also for files of this machine.
    """
    if words[:1] != ("build",):
        raise UsageError("expected a build after --: reap2gguf jobs run -- build MODEL --recipe R")
    root = click.get_current_context().find_root()  # its settings are in effect for every command
    with build.make_context("build", list(words[1:]), parent=root) as context:
        given = context.get_parameter_source
        for parameter in build.params:
            name, value = parameter.name or "", context.params.get(parameter.name or "")
            is_given = given(name) is not click.core.ParameterSource.DEFAULT
            if name == "output" and is_given:
                raise UsageError(f"--output: {_ONLY_THERE}; leave it out")
            if for_elsewhere and is_given and (value is not None or not parameter.expose_value):
                _check_not_local(parameter, value)
        if context.params["fresh"]:
            raise UsageError(
                "--fresh: a job that resumes would start over each time; leave it out, and remove "
                "the job's folder in the storage instead"
            )
        return dict(context.params)


def _check_not_local(parameter: click.Parameter, value: Any) -> None:
    """Refuse a file or folder of this machine, which the other one does not have."""
    option_name = parameter.opts[0]
    is_path = isinstance(parameter.type, click.Path)
    is_model = parameter.name == "model"
    is_text = parameter.name == "spec"
    if is_path or ((is_model or is_text) and Path(str(value)).expanduser().exists()):
        what = "MODEL" if is_model else option_name
        place = "names" if value is None else f"{value}:"  # libggml's folder is not kept
        advice = "use a repository on the Hub (owner/name)"
        raise UsageError(f"{what} {place} a file or folder of this machine, not there; {advice}")


def plan_of(arguments: dict[str, Any]) -> Plan:
    """The plan of a build with these arguments."""
    flags = (arguments[name] for name in ("fresh", "replace", "space_check"))
    options = collect(arguments, *flags)
    return reap2gguf.plan(options, progress=terminal_progress())
