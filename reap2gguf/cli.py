"""The command line: parse, call one library function, print."""

from __future__ import annotations

import errno
import logging
import os
import shlex
import signal
import sys
from typing import Any, NoReturn

import click

from reap2gguf import __version__
from reap2gguf.errors import OutputError, PeerError, Reap2ggufError, VerificationError
from reap2gguf.machine import processes
from reap2gguf.messages import one_line
from reap2gguf.terminal.build_commands import HAS_BEGUN, build, plan_command, verify
from reap2gguf.terminal.doctor_command import doctor
from reap2gguf.terminal.local_commands import chat, serve
from reap2gguf.terminal.publish_commands import push
from reap2gguf.terminal.recipe_commands import recipes
from reap2gguf.terminal.stage_commands import imatrix, observe, prune, quantize

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
            advice = _resume_advice(bool(ctx.meta.get(HAS_BEGUN))) if resumes else ""
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


for command in (
    *(build, plan_command, verify, observe, prune, imatrix, quantize, recipes, doctor),
    *(chat, serve, push),
):
    cli.add_command(command)


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
