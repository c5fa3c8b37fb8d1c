"""`build`, `plan` and `verify`: the whole way from a model to a verified bundle."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from reap2gguf.errors import VerificationError
from reap2gguf.machine import processes
from reap2gguf.messages import one_line
from reap2gguf.terminal.options import (
    FolderPath,
    build_options,
    collect,
    llama_cpp_option,
    threads_option,
)

if TYPE_CHECKING:
    from reap2gguf.building.estimate import Estimate
    from reap2gguf.building.plan import Plan

HAS_BEGUN = "reap2gguf.build.has_begun"  # in the context of the command, for advice on resuming


@click.command()
@build_options
@click.option("--fresh", is_flag=True, help="Start over, reusing nothing.")
@click.option(
    "--space-check/--no-space-check", default=True,
    help="Whether to ask the disk for room before the work.",
)  # fmt: skip
def build(fresh: bool, space_check: bool, **arguments: Any) -> None:
    """Prune, quantize, verify and bundle MODEL (a folder or owner/name on the Hub).

    MODEL may be left out for the bundled example. Stopped at any point, the same command goes on
    from there; with other options it reuses every stage that they do not touch.

    \b
    Example:
      reap2gguf build --recipe unsloth-iq4km
      reap2gguf build ./Qwen3-30B-A3B --recipe q4km --recipe q8_0 --keep-experts 96
    """
    from reap2gguf import api
    from reap2gguf.terminal.console import terminal_progress
    from reap2gguf.terminal.views import plan_lines, result_lines

    progress = terminal_progress()
    plan = api.plan(collect(arguments, fresh, space_check), progress=progress)
    if processes().is_first:
        _print(plan_lines(plan, _estimate(plan)))
        click.get_current_context().meta[HAS_BEGUN] = True
    if result := api.build(plan, progress=progress):
        _print(result_lines(result))


@click.command("plan")
@build_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def plan_command(as_json: bool, **arguments: Any) -> None:
    """Say what `build` would do, from headers alone.

    \b
    Example:
      reap2gguf plan ./Qwen3-30B-A3B --recipe unsloth-iq4km --compression 0.5
    """
    from reap2gguf import api
    from reap2gguf.building.plan import plan_as_json
    from reap2gguf.terminal.console import terminal_progress
    from reap2gguf.terminal.views import plan_lines

    plan = api.plan(collect(arguments), progress=terminal_progress())
    needs = _estimate(plan)
    if as_json:
        click.echo(json.dumps(plan_as_json(plan, needs), indent=1))
    else:
        _print(plan_lines(plan, needs))


@click.command()
@click.argument("paths", nargs=-1, required=True, type=FolderPath)
@threads_option
@llama_cpp_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def verify(paths: tuple[Path, ...], threads: int, as_json: bool) -> None:
    """Check a bundle, or HF_DIR and GGUF files made from it; exit 1 if anything is wrong.

    \b
    Example:
      reap2gguf verify build/Qwen3-30B-A3B-REAP-0.25-GGUF
      reap2gguf verify ./Qwen3-30B-A3B-REAP Qwen3-30B-A3B-REAP-Q4_K_M.gguf
    """
    from reap2gguf import api
    from reap2gguf.terminal.console import terminal_progress

    report = api.verify(*paths, threads=threads, progress=terminal_progress())
    if as_json:
        values = {"checked": report.checked, "violations": report.violations}
        click.echo(json.dumps(values, indent=1))
        sys.exit(VerificationError.exit_code if report.violations else 0)
    if report.violations:
        raise VerificationError(list(report.violations))
    click.echo(f"{', '.join(report.checked)}: no violations")


def _estimate(plan: Plan) -> Estimate:
    """What the plan needs here; looking for a GPU without loading torch."""
    from reap2gguf.building.estimate import estimate

    return estimate(plan, plan.options.compute.likely_device == "cuda")


def _print(lines: Iterable[str]) -> None:
    for line in lines:
        click.echo(one_line(line))
