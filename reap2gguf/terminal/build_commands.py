"""`reap2gguf build`, `plan` and `verify`: from a model to a verified bundle."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

import reap2gguf
from reap2gguf.errors import VerificationError
from reap2gguf.machine import processes
from reap2gguf.terminal.click_options import (
    build_options,
    collect,
    json_option,
    llama_cpp_option,
    output_options,
    threads_option,
)
from reap2gguf.terminal.console import is_verbose, say, say_all, say_json, terminal_progress
from reap2gguf.terminal.help import CHECKS, command, option
from reap2gguf.terminal.option_types import FolderPath

HAS_BEGUN = "reap2gguf.build.has_begun"  # set in the context once --fresh took effect


@command()
@build_options
@option("--fresh", is_flag=True, help="Start from scratch: reuse nothing.")
@option(
    "--space-check/--no-space-check", default=True, help="Check free disk space before starting."
)
@output_options
def build(fresh: bool, space_check: bool, **arguments: Any) -> None:
    """Prune, quantize, verify and bundle MODEL.

    MODEL is a folder or a name on the Hub (owner/name); without it the bundled example is built.
    To resume an interrupted build, run the same command again. With different options, unaffected
    stages are reused.

    \b
    Example:
      reap2gguf build --recipe unsloth-iq4km
      reap2gguf build ./Qwen3-30B-A3B --recipe q4km --recipe q8_0 --keep-experts 96
    """
    from reap2gguf.terminal.plan_views import up_to_date_or_lines
    from reap2gguf.terminal.views import result_lines

    progress = terminal_progress()
    plan = reap2gguf.plan(collect(arguments, fresh, space_check), progress=progress)
    if processes().is_first:
        say_all(up_to_date_or_lines(plan, reap2gguf.estimate(plan)))
        click.get_current_context().meta[HAS_BEGUN] = True
    if result := reap2gguf.build(plan, progress=progress):
        say_all(result_lines(result))


@command("plan")
@build_options
@option("--tensors", is_flag=True, help="Show the type of every kind of tensor.")
@json_option
@output_options
def plan_command(tensors: bool, as_json: bool, **arguments: Any) -> None:
    """Show what `build` would do (dry run).

    Prints sizes, types, and what it needs of this machine: memory, disk and time. Reads headers
    and small texts only, and loads no weights. The first run measures the machine for a second.

    \b
    Example:
      reap2gguf plan ./Qwen3-30B-A3B --recipe unsloth-iq4km --compression 0.5
    """
    from reap2gguf.terminal.plan_views import plan_as_json, plan_lines

    plan = reap2gguf.plan(collect(arguments), progress=terminal_progress())
    needs = reap2gguf.estimate(plan)
    if as_json:
        say_json(plan_as_json(plan, needs))
    else:
        say_all(plan_lines(plan, needs, tensors or is_verbose()))


@command()
@click.argument("paths", nargs=-1, required=True, type=FolderPath)
@option("--source", section=CHECKS, metavar="MODEL", help="Compare with the model that was pruned.")
@option(
    "--exact",
    section=CHECKS,
    is_flag=True,
    help="Quantize every tensor again and compare the bytes.",
)
@option(
    "--require",
    section=CHECKS,
    type=click.Choice(["hashes", "values", "exact"]),
    help="Fail if a file was compared less strictly.",
)
@threads_option
@llama_cpp_option
@json_option
@output_options
def verify(
    paths: tuple[Path, ...],
    source: str | None,
    exact: bool,
    require: str | None,
    threads: int,
    as_json: bool,
) -> None:
    """Check a bundle, or an HF folder with GGUFs.

    Reads everything back from disk and exits with 1 if anything is wrong. PATHS are the folders of
    a bundle, or a safetensors folder and GGUF files that were made from it. Prints how strictly
    each file was compared (hashes, values or exact), and what could not be checked.

    \b
    Example:
      reap2gguf verify build/Qwen3-30B-A3B-REAP-0.25-GGUF
      reap2gguf verify build/Qwen3-30B-A3B-REAP-0.25-GGUF --source Qwen/Qwen3-30B-A3B --exact
      reap2gguf verify ./Qwen3-30B-A3B-REAP Qwen3-30B-A3B-REAP-Q4_K_M.gguf
    """

    from reap2gguf.terminal.report_views import report_as_json, report_lines, too_weak

    report = reap2gguf.verify(
        *paths, source=source, exact=exact, threads=threads, progress=terminal_progress()
    )
    missing = too_weak(report, require)
    if as_json:
        say_json(report_as_json(report, missing))
        sys.exit(VerificationError.exit_code if report.violations or missing else 0)
    say_all(report_lines(report))
    if report.violations or missing:
        raise VerificationError([*report.violations, *missing])
    say(f"OK: {', '.join(report.checked)} verified", "result")
