"""What is printed: results on stdout; notes, progress and errors on stderr."""

from __future__ import annotations

import enum
import json
import logging
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import click

from reap2gguf.machine import processes
from reap2gguf.messages import duration, one_line, quantity, without_password
from reap2gguf.progress import Progress, Silent, Task

_LINE_SECONDS = 5.0  # plain lines about one task are printed at most this often


class Detail(enum.Enum):
    """How much is printed; the value is the lowest level of log records that is shown."""

    QUIET = logging.ERROR  # results and errors
    NORMAL = logging.WARNING
    VERBOSE = logging.INFO


_detail = Detail.NORMAL  # of the running command: a process runs one command at a time


@contextmanager
def printing(detail: Detail) -> Iterator[None]:
    """Print that much while the context is open, log records of libraries included."""
    global _detail
    earlier, _detail = _detail, detail
    root, handler = logging.getLogger(), LogHandler(detail.value)
    earlier_level = root.level
    root.addHandler(handler)
    root.setLevel(detail.value)
    try:
        yield
    finally:
        root.removeHandler(handler)
        root.setLevel(earlier_level)
        _detail = earlier


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
        click.echo(prefix + one_line(without_password(text)), err=kind != "result")


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


def terminal_progress() -> Progress:
    """Bars where stderr is a terminal, else lines; nothing with --quiet.

    With several processes only the first prints progress.
    """
    if not processes().is_first or _detail is Detail.QUIET:
        return Silent()
    if not sys.stderr.isatty():
        return Lines()
    from reap2gguf.terminal.bars import Bars

    return Bars(is_verbose=is_verbose())


class Lines:
    """A line when a task begins and ends, and at intervals between; more often with --verbose."""

    @contextmanager
    def task(self, title: str, total: float, unit: str) -> Iterator[Task]:
        line = _Line(title, total, unit)
        say(f"{title}: {quantity(total, unit)}")
        yield line
        say(f"{title}: done in {time.monotonic() - line.begun:.1f} s")

    def note(self, text: str) -> None:
        say(text)


class _Line:
    def __init__(self, title: str, total: float, unit: str) -> None:
        self.begun = self._printed = time.monotonic()
        self._title = title
        self._total = max(total, 1)
        self._unit = unit
        self._done = 0.0
        self._interval = _LINE_SECONDS / 5 if is_verbose() else _LINE_SECONDS

    def advance(self, amount: float = 1) -> None:
        self._done += amount
        now = time.monotonic()
        if now - self._printed < self._interval:
            return
        self._printed = now
        share = self._done / self._total
        left = (now - self.begun) / share - (now - self.begun) if share else 0
        done = quantity(self._done, self._unit)
        say(f"{self._title}: {share:.0%}, {done}, {duration(left)} left")
