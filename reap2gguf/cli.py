"""The command line: parse, call one library function, print."""

from __future__ import annotations

import errno
import json
import logging
import os
import shlex
import signal
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from reap2gguf import __version__
from reap2gguf.errors import OutputError, PeerError, Reap2ggufError, VerificationError
from reap2gguf.machine import processes
from reap2gguf.messages import one_line
from reap2gguf.terminal.doctor_command import doctor
from reap2gguf.terminal.local_commands import chat, serve
from reap2gguf.terminal.options import (
    FolderPath,
    build_options,
    collect,
    llama_cpp_option,
    threads_option,
)
from reap2gguf.terminal.publish_commands import push
from reap2gguf.terminal.recipe_commands import recipes
from reap2gguf.terminal.stage_commands import imatrix, observe, prune, quantize, say

if TYPE_CHECKING:
    from reap2gguf.building.estimate import Estimate
    from reap2gguf.building.plan import Plan


_HAS_BEGUN = "reap2gguf.build.has_begun"
_RESUMING = ("build", "observe", "imatrix", "quantize", "push")


class _Group(click.Group):
    """Turns errors into one line and an exit code; anything that is no error of use is a bug."""

    def make_context(self, *arguments: Any, **named: Any) -> click.Context:
        try:
            return super().make_context(*arguments, **named)
        except click.UsageError as error:
            _fail_usage(error)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except click.UsageError as error:
            _fail_usage(error)
        except VerificationError as error:
            for violation in error.violations:
                click.echo(one_line(violation), err=True)
            _fail(str(error), error.exit_code)
        except Reap2ggufError as error:
            _fail(str(error), error.exit_code)
        except KeyboardInterrupt:
            if not processes().is_first:
                sys.exit(130)  # the first speaks
            resumes = ctx.invoked_subcommand in _RESUMING
            advice = _resume_advice(bool(ctx.meta.get(_HAS_BEGUN))) if resumes else ""
            _fail(f"interrupted{advice}", 130)
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise
            _fail(f"{error.filename or 'output'}: {error.strerror or error}", OutputError.exit_code)


def _resume_advice(has_begun: bool) -> str:
    """The command that goes on: the same one, but for a demand to start over that was met."""
    if processes().size > 1:
        return "; to go on, run the same torchrun command"
    words = [word for word in sys.argv[1:] if word != "--fresh" or not has_begun]
    return f"; to go on: {shlex.join(['reap2gguf', *words])}"


def _interrupt(number: int, frame: object) -> None:
    """A signal that ends the process ends it as Ctrl-C does: in order, and able to go on."""
    signal.signal(number, signal.SIG_IGN)  # once is enough; SIGKILL is for the impatient
    raise KeyboardInterrupt


def _fail(message: str, code: int) -> NoReturn:
    click.echo(one_line(f"Error: {message}"), err=True)
    sys.exit(code)


def _fail_usage(error: click.UsageError) -> NoReturn:
    """A wrong argument in one line; a group that was called without a command shows its help."""
    if isinstance(error, getattr(click.exceptions, "NoArgsIsHelpError", ())):  # not in click 8.1
        raise error
    advice = f" (see `{error.ctx.command_path} --help`)" if error.ctx else ""
    _fail(" ".join(error.format_message().split()).rstrip(".") + advice, error.exit_code)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def cli() -> None:
    """Prune a Mixture-of-Experts model with REAP and publish it as verified GGUF and safetensors.

    \b
    Example:
      reap2gguf plan  Qwen/Qwen3-30B-A3B --recipe unsloth-iq4km --compression 0.25
      reap2gguf build Qwen/Qwen3-30B-A3B --recipe unsloth-iq4km --compression 0.25
    """


@cli.command()
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
    from reap2gguf.building.plan import make_plan

    plan = make_plan(collect(arguments, fresh, space_check), say)
    from reap2gguf.building.pipeline import build as run
    from reap2gguf.building.pipeline import follow
    from reap2gguf.terminal.console import terminal_progress
    from reap2gguf.terminal.views import plan_lines, result_lines

    if not processes().is_first:
        follow(plan)
        return
    _print(plan_lines(plan, _estimate(plan)))
    click.get_current_context().meta[_HAS_BEGUN] = True
    _print(result_lines(run(plan, terminal_progress())))


@cli.command("plan")
@build_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def plan_command(as_json: bool, **arguments: Any) -> None:
    """Say what `build` would do, from headers alone.

    \b
    Example:
      reap2gguf plan ./Qwen3-30B-A3B --recipe unsloth-iq4km --compression 0.5
    """
    from reap2gguf.building.plan import make_plan, plan_as_json

    plan = make_plan(collect(arguments), say)
    from reap2gguf.terminal.views import plan_lines

    needs = _estimate(plan)
    if as_json:
        click.echo(json.dumps(plan_as_json(plan, needs), indent=1))
    else:
        _print(plan_lines(plan, needs))


@cli.command()
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
    from reap2gguf.terminal.console import terminal_progress
    from reap2gguf.verifying.bundle import verify_paths

    report = verify_paths(paths, threads, terminal_progress())
    if as_json:
        values = {"checked": report.checked, "violations": report.violations}
        click.echo(json.dumps(values, indent=1))
        sys.exit(VerificationError.exit_code if report.violations else 0)
    if report.violations:
        raise VerificationError(list(report.violations))
    click.echo(f"{', '.join(report.checked)}: no violations")


for command in (observe, prune, imatrix, quantize, recipes, doctor, chat, serve, push):
    cli.add_command(command)


def _estimate(plan: Plan) -> Estimate:
    """What the plan needs here; looking for a GPU without loading torch."""
    from reap2gguf.building.estimate import estimate

    return estimate(plan, plan.options.compute.likely_device == "cuda")


def _print(lines: Iterable[str]) -> None:
    for line in lines:
        click.echo(one_line(line))


class _OneLine(logging.Formatter):
    """What libraries warn of: they may name what stands in a file."""

    def format(self, record: logging.LogRecord) -> str:
        return one_line(super().format(record))


def main() -> None:
    """The entry point of the `reap2gguf` program."""
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(_OneLine())
    signal.signal(signal.SIGTERM, _interrupt)
    # what it warns of is tried again, and said, here
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    if processes().size == 1:
        cli(prog_name="reap2gguf")
        return
    try:
        cli(prog_name="reap2gguf")
    except SystemExit as end:
        _leave_others(end.code)
        raise


def _leave_others(code: str | int | None) -> None:
    """End among several processes: in order if all is well, else at once, so that none waits."""
    status = code if isinstance(code, int) else int(code is not None)
    if not status:
        from reap2gguf.observing.compute.ranks import leave

        try:
            leave()
        except PeerError as error:
            click.echo(one_line(f"Error: {error}"), err=True)
            status = error.exit_code
    if status:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
