"""`reap2gguf build`, `plan` and `verify`: from a model to a verified bundle."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import reap2gguf
from reap2gguf.errors import VerificationError
from reap2gguf.machine import processes
from reap2gguf.messages import size
from reap2gguf.options import DEVICES
from reap2gguf.terminal.click_options import (
    build_options,
    collect,
    json_option,
    output_options,
)
from reap2gguf.terminal.compute_options import (
    llama_cpp_option,
    threads_option,
)
from reap2gguf.terminal.config_file import warn_of_differences
from reap2gguf.terminal.console import is_verbose, say, say_all, say_json, terminal_progress
from reap2gguf.terminal.help import CHECKS, COMPUTE, command, option
from reap2gguf.terminal.option_types import FolderPath

if TYPE_CHECKING:
    from reap2gguf.building.plan import Plan
    from reap2gguf.progress import Progress

HAS_BEGUN = "reap2gguf.build.has_begun"  # set in the context once --fresh took effect


@command()
@build_options
@option("--fresh", is_flag=True, help="Start from scratch: reuse nothing.")
@option(
    "--replace",
    is_flag=True,
    help="Delete GGUF files of the finished bundle that this command does not name.",
)
@option("--yes", is_flag=True, help="Do not ask before files are deleted.")
@option(
    "--space-check/--no-space-check", default=True, help="Check free disk space before starting."
)
@option("--dry-run", is_flag=True, help="Do what `plan` does, and build nothing.")
@json_option
@output_options
def build(
    fresh: bool,
    replace: bool,
    yes: bool,
    space_check: bool,
    dry_run: bool,
    as_json: bool,
    **arguments: Any,
) -> None:
    """Prune, quantize, verify and bundle MODEL.

    MODEL is a folder or a name on the Hub (owner/name); without it the bundled example is built.
    It may be a GGUF file (owner/name:FILE on the Hub): without --recipe its blocks stay as they
    are.
    To resume an interrupted build, run the same command again. With different options, unaffected
    stages are reused. With other recipes, GGUF files are added to the finished bundle.

    \b
    Example:
      reap2gguf build --recipe unsloth-iq4km
      reap2gguf build ./Qwen3-30B-A3B --recipe Q4_K_M,Q8_0 --keep-experts 96
      reap2gguf build ./Qwen3-30B-A3B --compression auto --target-size 12GiB
      reap2gguf build Qwen3-30B-A3B-Q4_K_M.gguf --memory 4GiB
      reap2gguf build --like reap2gguf.json
    """
    from reap2gguf.terminal.plan_views import up_to_date_or_lines

    progress = terminal_progress()
    options = collect(arguments, fresh, replace, space_check)
    if processes().size > 1:
        from reap2gguf.observing.compute.ranks import join

        join()  # so that each hears of it if another one cannot begin
    plan = reap2gguf.plan(options, progress=progress)
    warn_of_differences(plan)
    if processes().is_first and replace and not dry_run:
        _confirm_deletion(plan, yes)
    if processes().is_first and dry_run:
        _say_plan(plan, as_json)
    elif processes().is_first and not as_json:
        say_all(up_to_date_or_lines(plan, reap2gguf.estimate(plan)))
    if dry_run:
        return
    if not processes().is_first:
        reap2gguf.build(plan, progress=progress)
        return
    click.get_current_context().meta[HAS_BEGUN] = True
    _build_logged(plan, progress, as_json)


def _build_logged(plan: Plan, progress: Progress, as_json: bool) -> None:
    """Build, keep a log of it, and print the result."""
    from reap2gguf.terminal.build_log import BuildLog, LoggedProgress
    from reap2gguf.terminal.json_views import result_as_json
    from reap2gguf.terminal.views import result_lines

    log = BuildLog(plan.options.output / ".work" / f"{plan.name}.log")
    with log.kept():
        log.begin()
        result = reap2gguf.build(plan, progress=LoggedProgress(progress, log))
        assert result is not None  # in the first process
        lines = list(result_lines(result))
        for line in filter(None, lines):
            log.write(line)
    if log.problem:
        say(f"{log.path}: the log could not be written ({log.problem})")
    if as_json:
        say_json(result_as_json(result, log.path))
    else:
        say_all(lines)


def _say_plan(plan: Plan, as_json: bool, with_tensors: bool = False) -> None:
    """Print a plan, and what it needs of this machine."""
    from reap2gguf.terminal.plan_json import plan_as_json
    from reap2gguf.terminal.plan_views import plan_lines

    needs = reap2gguf.estimate(plan)
    if as_json:
        say_json(plan_as_json(plan, needs))
    else:
        say_all(plan_lines(plan, needs, with_tensors or is_verbose()))


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
    plan = reap2gguf.plan(collect(arguments), progress=terminal_progress())
    warn_of_differences(plan)
    _say_plan(plan, as_json, tensors)


@command()
@click.argument("paths", nargs=-1, required=True, type=FolderPath)
@option("--source", section=CHECKS, metavar="MODEL", help="Compare with the model that was pruned.")
@option(
    "--exact",
    section=CHECKS,
    is_flag=True,
    help="Quantize every tensor again, also of slow types; all bytes must be equal.",
)
@option(
    "--require",
    section=CHECKS,
    type=click.Choice(["hashes", "values", "exact"]),
    help="Fail if a file was compared less strictly.",
)
@option(
    "--device",
    section=COMPUTE,
    type=click.Choice(DEVICES),
    default="auto",
    help="What quantizes again: auto is a GPU, if there is one, for large files.",
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
    device: str,
    threads: int,
    as_json: bool,
) -> None:
    """Check a bundle, or an HF folder with GGUFs.

    Reads everything back from disk and exits with 1 if anything is wrong. PATHS are the folders of
    a bundle, or a safetensors folder and GGUF files that were made from it, or GGUF files that were
    made from the GGUF file --source, by `prune` or `quantize`. Prints how strictly each file was
    compared (hashes, values or exact), and what could not be checked.

    \b
    Example:
      reap2gguf verify build/Qwen3-30B-A3B-REAP-0.25-GGUF
      reap2gguf verify build/Qwen3-30B-A3B-REAP-0.25-GGUF --source Qwen/Qwen3-30B-A3B --exact
      reap2gguf verify ./Qwen3-30B-A3B-REAP Qwen3-30B-A3B-REAP-Q4_K_M.gguf
      reap2gguf verify Qwen3-30B-A3B-REAP-Q4_K_M.gguf --source Qwen3-30B-A3B-Q4_K_M.gguf
    """

    from reap2gguf.terminal.report_views import report_as_json, report_lines, too_weak

    shown = terminal_progress()
    report = reap2gguf.verify(
        *paths, source=source, exact=exact, device=device, threads=threads, progress=shown
    )
    missing = too_weak(report, require)
    if as_json:
        say_json(report_as_json(report, missing))
        sys.exit(VerificationError.exit_code if report.violations or missing else 0)
    say_all(report_lines(report))
    if report.violations or missing:
        raise VerificationError([*report.violations, *missing])
    say(f"OK: {', '.join(report.checked)} verified", "result")


def _confirm_deletion(plan: Plan, yes: bool) -> None:
    """Name the files that --replace deletes; on a terminal, ask first."""
    from reap2gguf.building.standing import dropped_files
    from reap2gguf.building.workdir import Workdir

    dropped = dropped_files(plan, Workdir(plan.options.output, plan.name))
    for name, n_bytes in dropped:
        say(f"--replace deletes {name} ({size(n_bytes)})")
    if dropped and not yes and sys.stdin.isatty() and processes().size == 1:
        click.confirm("Delete?", abort=True, err=True)
