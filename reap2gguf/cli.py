"""The `reap2gguf` program: its commands, its errors and its exit codes."""

from __future__ import annotations

import errno
import logging
import os
import shlex
import sys
from typing import Any, NoReturn

import click

from reap2gguf import __version__
from reap2gguf.errors import OutputError, PeerError, Reap2ggufError, VerificationError
from reap2gguf.machine import processes
from reap2gguf.terminal.add_command import add
from reap2gguf.terminal.build_commands import HAS_BEGUN, build, plan_command, verify
from reap2gguf.terminal.bundle_command import bundle
from reap2gguf.terminal.choose_command import choose
from reap2gguf.terminal.compare_command import compare
from reap2gguf.terminal.console import LogHandler, abandon, is_verbose, quiet_libraries, say
from reap2gguf.terminal.doctor_command import doctor
from reap2gguf.terminal.evaluate_command import evaluate
from reap2gguf.terminal.example_command import example
from reap2gguf.terminal.imatrix_commands import imatrix
from reap2gguf.terminal.inspect_command import inspect_command
from reap2gguf.terminal.interrupts import INTERRUPTED, interrupts
from reap2gguf.terminal.jobs_command import jobs
from reap2gguf.terminal.local_commands import chat, serve
from reap2gguf.terminal.mixes_command import mixes
from reap2gguf.terminal.observations_commands import observations
from reap2gguf.terminal.publish_commands import push
from reap2gguf.terminal.recipe_commands import recipes
from reap2gguf.terminal.report_command import report
from reap2gguf.terminal.stage_commands import observe, prune, quantize
from reap2gguf.terminal.suggestions import Group, option_message

_RESUMABLE = ("build", "add", "observe", "imatrix", "quantize", "push")
_RESUMABLE_WITH_OUTPUT = ("evaluate", "compare", "choose")  # keep progress beside the output


class _Group(Group):
    """Turns expected errors into one line and an exit code; any other exception is a bug."""

    def make_context(self, *arguments: Any, **named: Any) -> click.Context:
        try:
            return super().make_context(*arguments, **named)
        except click.UsageError as error:
            _fail_usage(error)
        except OSError as error:  # printing the help or the version
            _fail_output(error)

    def invoke(self, ctx: click.Context) -> Any:
        interrupts.at_end(lambda: _say_interrupted(ctx))
        try:
            return super().invoke(ctx)
        except click.UsageError as error:
            _fail_usage(error)
        except VerificationError as error:
            for violation in error.violations:
                say(violation, "error")
            _fail(error, error.exit_code)
        except Reap2ggufError as error:
            _fail(error, error.exit_code)
        except KeyboardInterrupt:
            interrupts.end()
            sys.exit(INTERRUPTED)
        except OSError as error:
            _fail_output(error)


def _say_interrupted(ctx: click.Context) -> None:
    """One message for all processes."""
    if processes().is_first:
        is_here = sys.argv[1:3] == ["jobs", "here"]
        is_resumable = is_here or ctx.invoked_subcommand in _RESUMABLE
        advice = ""
        if ctx.invoked_subcommand in (
            "evaluate",
            "compare",
            "choose",
        ):  # keep progress beside the output
            is_resumable = any(word.startswith(("-o", "--output")) for word in sys.argv)
            advice = " Nothing is kept of it: only a run with --output FILE can be resumed."
        if is_resumable:
            advice = _resume_advice(bool(ctx.meta.get(HAS_BEGUN)))
        say(f"Interrupted.{advice}", "error")


def _resume_advice(has_begun: bool) -> str:
    """The command that resumes: the same one, without --fresh if that took effect."""
    if processes().size > 1:
        return " Resume with the same torchrun command."
    words = [word for word in sys.argv[1:] if word != "--fresh" or not has_begun]
    return f" Resume with: {shlex.join(['reap2gguf', *words])}"


def _fail(error: Exception, code: int) -> NoReturn:
    say(f"Error: {error}", "error")
    if processes().size > 1 and not isinstance(error, PeerError):
        from reap2gguf.observing.compute.ranks import tell

        tell(str(error))
    cause = error.__cause__
    while is_verbose() and cause is not None:
        say(f"  caused by {type(cause).__name__}: {cause}", "error")
        cause = cause.__cause__
    sys.exit(code)


def _fail_output(error: OSError) -> NoReturn:
    """Report what could not be written; a reader that has enough ends the program silently."""
    if error.errno == errno.EPIPE:
        raise error
    try:
        sys.stdout.flush()
    except OSError:
        abandon(sys.stdout)
    place = f"{error.filename or 'output'}: {error.strerror or error}"
    _fail(OutputError(place), OutputError.exit_code)


def _fail_usage(error: click.UsageError) -> NoReturn:
    """Report a wrong argument in one line; a group without a command shows its help."""
    if isinstance(error, getattr(click.exceptions, "NoArgsIsHelpError", ())):  # not in click 8.1
        try:
            error.show()
        except OSError:
            abandon(sys.stderr)
        sys.exit(error.exit_code)
    advice = f" (see `{error.ctx.command_path} --help`)" if error.ctx else ""
    is_option = isinstance(error, click.NoSuchOption)
    message = option_message(error) if is_option else error.format_message()  # type: ignore[arg-type]
    message = " ".join(message.split()).rstrip(".")
    say(f"Error: {message}{advice}", "error")
    sys.exit(error.exit_code)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def cli() -> None:
    """Prune MoE models; write GGUF and safetensors.

    Removes experts of a Mixture-of-Experts model with REAP and writes the result as verified
    GGUF and safetensors files.

    \b
    Example:
      reap2gguf plan  Qwen/Qwen3-30B-A3B --recipe unsloth-iq4km --compression 0.25
      reap2gguf build Qwen/Qwen3-30B-A3B --recipe unsloth-iq4km --compression 0.25
    """


@click.command("help")
@click.argument("words", nargs=-1, metavar="[COMMAND]...")
@click.pass_context
def help_command(ctx: click.Context, words: tuple[str, ...]) -> None:
    """Show the help of a command.

    \b
    Example:
      reap2gguf help build
      reap2gguf help recipes check
    """
    parent = ctx.parent or ctx
    shown: click.Command = cli
    for word in words:
        if not isinstance(shown, click.Group):
            parent.fail(f"'{shown.name}' has no commands of its own")
        _, found, _ = shown.resolve_command(parent, [word])
        assert found is not None  # else it has failed
        parent, shown = click.Context(found, info_name=word, parent=parent), found
    click.echo(shown.get_help(parent))


for command in (
    *(build, plan_command, add, verify, observe, observations, prune, imatrix, quantize),
    *(recipes, doctor, choose, evaluate, compare, inspect_command, report, bundle, chat, serve),
    *(push, example, mixes, jobs),
    help_command,
):
    cli.add_command(command)


def main() -> None:
    """Run the `reap2gguf` program."""
    logging.lastResort = LogHandler(logging.ERROR)  # in effect without --verbose or --quiet
    logging.captureWarnings(True)  # shown with --verbose only
    interrupts.watch()
    quiet_libraries()
    if processes().size == 1:
        cli(prog_name="reap2gguf")
        return
    try:
        cli(prog_name="reap2gguf")
    except SystemExit as end:
        _leave_others(end.code)
        raise


def _leave_others(code: str | int | None) -> None:
    """End one of several processes: in order after success, else at once, so that none waits."""
    status = code if isinstance(code, int) else int(code is not None)
    if not status:
        from reap2gguf.observing.compute.ranks import leave

        try:
            leave()
        except PeerError as error:
            say(f"Error: {error}", "error")
            status = error.exit_code
    if status:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
