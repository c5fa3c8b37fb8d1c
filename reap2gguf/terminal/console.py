"""What is printed: results on stdout; notes, progress and errors on stderr."""

from __future__ import annotations

import enum
import errno
import json
import logging
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, TextIO

import click

from reap2gguf.machine import processes
from reap2gguf.messages import one_line, without_password, wrapped
from reap2gguf.progress import Progress, Silent

_DUMB = ("dumb", "unknown")  # values of TERM for terminals that cannot move the cursor


class Detail(enum.Enum):
    """How much is printed."""

    QUIET = enum.auto()  # results and errors
    NORMAL = enum.auto()
    VERBOSE = enum.auto()  # and what libraries log

    @property
    def lowest_level(self) -> int:
        """The lowest level of log records that is printed: others only for --verbose."""
        return logging.INFO if self is Detail.VERBOSE else logging.ERROR


_quieted: set[str] = set()  # variables of the environment that `quiet_libraries` has set
_detail = Detail.NORMAL  # of the running command: a process runs one command at a time


@contextmanager
def printing(detail: Detail) -> Iterator[None]:
    """Print that much while the context is open, log records of libraries included."""
    global _detail
    earlier, _detail = _detail, detail
    root, handler = logging.getLogger(), LogHandler(detail.lowest_level)
    earlier_level = root.level
    root.addHandler(handler)
    root.setLevel(detail.lowest_level)
    if detail is Detail.VERBOSE:
        _hear_libraries()
    try:
        yield
    finally:
        root.removeHandler(handler)
        root.setLevel(earlier_level)
        _detail = earlier


# Their progress bars and warnings: this program draws its own bars, repeats failed requests
# itself, and says where another package would make it faster. Read when they are imported.
_QUIET_LIBRARIES = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_VERBOSITY": "error",
    "TRANSFORMERS_VERBOSITY": "error",
}
_LOUD_LIBRARIES = {"HF_HUB_VERBOSITY": "warning", "TRANSFORMERS_VERBOSITY": "warning"}


def quiet_libraries() -> None:
    """Keep the messages of libraries off the screen, unless the user's environment asks for them.

    Call it before they are imported.
    """
    for name, value in _QUIET_LIBRARIES.items():
        if name not in os.environ:
            os.environ[name] = value
            _quieted.add(name)


def _hear_libraries() -> None:
    """Let them print what `quiet_libraries` has turned off, but for the bars."""
    for name in _quieted & _LOUD_LIBRARIES.keys():
        os.environ[name] = _LOUD_LIBRARIES[name]


def is_verbose() -> bool:
    """Whether the command runs with --verbose."""
    return _detail is Detail.VERBOSE


def say(text: str, kind: Literal["result", "note", "error"] = "note", *, prefix: str = "") -> None:
    """Print a line, made safe by `one_line`: a result on stdout, a note or an error on stderr.

    Passwords in URLs are left out: an argument or an address of a proxy may hold one.

    `prefix` is printed as it is, colours included. --quiet drops notes. With several
    processes only the first prints results and notes; each one prints its errors.
    """
    if kind != "error" and not processes().is_first:
        return
    if kind != "note" or _detail is not Detail.QUIET:
        color = False if os.environ.get("NO_COLOR") else None
        line = one_line(without_password(text))
        stream = sys.stdout if kind == "result" else sys.stderr
        if stream.isatty():
            line = wrapped(line, shutil.get_terminal_size().columns - len(click.unstyle(prefix)))
        try:
            click.echo(prefix + line, err=kind != "result", color=color)
        except OSError as error:
            if kind == "result" or (kind == "note" and error.errno == errno.EPIPE):
                raise
            abandon(sys.stderr)  # the work and the exit code matter more


def abandon(stream: TextIO) -> None:
    """Let a stream that cannot be written lead nowhere; Python would fail again at its end."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, stream.fileno())
    os.close(nothing)


def say_all(lines: Iterable[str]) -> None:
    """Print results, one per line."""
    for line in lines:
        say(line, "result")


def say_json(values: Any) -> None:
    """Print a result for programs; JSON escapes control characters by itself."""
    if processes().is_first:
        click.echo(json.dumps(values, indent=1))


def say_piece(text: str) -> None:
    """Print a piece of a result at once, as it is: the caller has made it safe."""
    click.echo(text, nl=False)


class LogHandler(logging.Handler):
    """Log records of libraries, one line each: they may quote text from files."""

    def emit(self, record: logging.LogRecord) -> None:
        say(self.format(record), "error" if record.levelno >= logging.ERROR else "note")


def screen_progress() -> Progress:
    """`terminal_progress` for a command whose output programs read: nothing in a pipe."""
    return terminal_progress() if sys.stderr.isatty() else Silent()


def terminal_progress() -> Progress:
    """Bars where stderr is a terminal that can move its cursor, else lines; nothing with --quiet.

    With several processes only the first prints progress.
    """
    if not processes().is_first or _detail is Detail.QUIET:
        return Silent()
    if not sys.stderr.isatty() or os.environ.get("TERM") in _DUMB:
        from reap2gguf.terminal.lines import Lines

        return Lines(say, is_verbose=is_verbose())
    from reap2gguf.terminal.bars import Bars

    return Bars()
