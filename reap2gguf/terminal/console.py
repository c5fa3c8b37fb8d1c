"""Progress on a terminal, and plain lines where there is none."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichBars

from reap2gguf.machine import processes
from reap2gguf.messages import one_line
from reap2gguf.progress import Progress, Silent, Task

_LINE_SECONDS = 5.0  # a plain line is worth reading at most this often


def terminal_progress() -> Progress:
    """Bars where stderr is a terminal, else lines; results go to stdout, progress never does.

    Of several processes only the first speaks.
    """
    if not processes().is_first:
        return Silent()
    return Bars() if sys.stderr.isatty() else Lines()


class Bars:
    """Live bars with the time left, one below the other where tasks run at the same time."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._lock = threading.Lock()
        self._bars: RichBars | None = None
        self._n_open = 0

    @contextmanager
    def task(self, title: str, total: float, unit: str) -> Iterator[Task]:
        bars = self._enter()
        try:
            yield _Bar(bars, bars.add_task(title, total=total, rate=""), unit)
        finally:
            self._leave()

    def _enter(self) -> RichBars:
        """The display, begun by the first of several tasks."""
        with self._lock:
            if self._bars is None:
                columns = (
                    TextColumn("{task.description}"),
                    BarColumn(),
                    TextColumn("{task.percentage:>3.0f}%"),
                    TextColumn("{task.fields[rate]}"),
                    TimeRemainingColumn(),
                )
                self._bars = RichBars(*columns, console=self._console)
                self._bars.start()
            self._n_open += 1
            return self._bars

    def _leave(self) -> None:
        """End the display with the last of several tasks."""
        with self._lock:
            self._n_open -= 1
            if not self._n_open and self._bars is not None:
                self._bars.stop()
                self._bars = None

    def note(self, text: str) -> None:
        self._console.print(one_line(text), highlight=False, markup=False)


class _Bar:
    def __init__(self, bars: RichBars, task: TaskID, unit: str) -> None:
        self._bars = bars
        self._task = task
        self._unit = unit

    def advance(self, amount: float = 1) -> None:
        task = next(task for task in self._bars.tasks if task.id == self._task)
        rate = f"{quantity(task.speed, self._unit)}/s" if task.speed else ""
        self._bars.update(self._task, advance=amount, rate=rate)


class Lines:
    """A line when a task begins and ends, and now and then between."""

    @contextmanager
    def task(self, title: str, total: float, unit: str) -> Iterator[Task]:
        line = _Line(title, total, unit)
        print(one_line(f"{title}: {quantity(total, unit)}"), file=sys.stderr, flush=True)
        yield line
        seconds = time.monotonic() - line.begun
        print(one_line(f"{title}: done in {seconds:.1f} s"), file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        print(one_line(text), file=sys.stderr, flush=True)


class _Line:
    def __init__(self, title: str, total: float, unit: str) -> None:
        self.begun = self._said = time.monotonic()
        self._title = title
        self._total = max(total, 1)
        self._unit = unit
        self._done = 0.0

    def advance(self, amount: float = 1) -> None:
        self._done += amount
        now = time.monotonic()
        if now - self._said < _LINE_SECONDS:
            return
        self._said = now
        share = self._done / self._total
        left = (now - self.begun) / share - (now - self.begun) if share else 0
        print(
            f"{self._title}: {share:.0%}, {quantity(self._done, self._unit)}, "
            f"{duration(left)} left",
            file=sys.stderr,
            flush=True,
        )


def quantity(amount: float | None, unit: str) -> str:
    """A number with its unit, readable: 1.2 M tokens, 3.4 GiB."""
    if amount is None:
        return f"? {unit}"
    if unit == "bytes":
        return size(amount)
    for scale, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if amount >= scale:
            return f"{amount / scale:.1f} {letter} {unit}"
    return f"{amount:.0f} {unit}"


def size(n_bytes: float) -> str:
    """Bytes in the unit that suits them."""
    for scale, letter in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if n_bytes >= scale:
            return f"{n_bytes / scale:.2f} {letter}"
    return f"{n_bytes:.0f} bytes"


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
