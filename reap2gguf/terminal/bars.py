"""Progress bars on a terminal."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichBars

from reap2gguf.messages import one_line, quantity

if TYPE_CHECKING:
    from reap2gguf.progress import Task


class Bars:
    """Live bars with the time left, one below the other where tasks run at the same time.

    With `is_verbose`, a line for each task remains on the screen.
    """

    def __init__(self, *, is_verbose: bool = False) -> None:
        self._is_verbose = is_verbose
        self._console = Console(stderr=True)
        self._lock = threading.Lock()
        self._bars: RichBars | None = None
        self._n_open = 0

    @contextmanager
    def task(self, title: str, total: float, unit: str) -> Iterator[Task]:
        bars = self._enter()
        begun = time.monotonic()
        try:
            yield _Bar(bars, bars.add_task(one_line(title), total=total, rate=""), unit)
            if self._is_verbose:
                self.note(f"{title}: {quantity(total, unit)} in {time.monotonic() - begun:.1f} s")
        finally:
            self._leave()

    def _enter(self) -> RichBars:
        """The display; the first of several tasks starts it."""
        with self._lock:
            if self._bars is None:
                columns = (
                    TextColumn("{task.description}", markup=False),
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
