"""Progress in a pipe, a file or a dumb terminal: plain lines with the time of day."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from reap2gguf.messages import quantity
from reap2gguf.terminal.meter import Meter, exact_duration

if TYPE_CHECKING:
    from reap2gguf.progress import Task

# A line about a running task is printed when both have passed, so that three hours of work make
# about 50 lines and a short task none between its begin and its end.
_LINE_SECONDS = 60.0
_LINE_SHARE = 0.02
_VERBOSE_SECONDS = 5.0
_SOON = 0.25  # seconds; after it, work that is not counted is announced


class Lines:
    """A line for `say` when a task begins and ends, and few between; more with `is_verbose`.

    Work that is not counted is announced after a quarter of a second, or before the next line: so
    a wrong argument that is found at once is one line.
    """

    def __init__(self, say: Callable[[str], None], *, is_verbose: bool = False) -> None:
        self._say_line = say
        self._is_verbose = is_verbose
        self._announcing = threading.RLock()
        self._unsaid: list[str] = []

    @contextmanager
    def task(self, title: str, total: float, unit: str) -> Iterator[Task]:
        line = _Line(title, total, unit, self.note, self._is_verbose)
        if not line.is_counted:
            with self._announced(f"{line.title} ..."):
                yield line
            return
        self.note(f"{line.title}: {quantity(total, unit)}")
        yield line
        self.note(f"{line.title}: done in {exact_duration(line.seconds)}")

    @contextmanager
    def _announced(self, text: str) -> Iterator[None]:
        timer = threading.Timer(_SOON, self._say_unsaid)
        timer.daemon = True
        with self._announcing:
            self._unsaid.append(text)
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            with self._announcing:
                if text in self._unsaid:
                    self._unsaid.remove(text)

    def _say_unsaid(self) -> None:
        with self._announcing:
            unsaid, self._unsaid = self._unsaid, []
            for text in unsaid:
                self._say(text)

    def note(self, text: str) -> None:
        self._say_unsaid()
        self._say(text)

    def _say(self, text: str) -> None:
        self._say_line(f"{time.strftime('%H:%M:%S')} {text}")


class _Line(Meter):
    def __init__(
        self, title: str, total: float, unit: str, say: Callable[[str], None], is_verbose: bool
    ) -> None:
        super().__init__(title, total, unit)
        self._say = say
        self._printing = threading.Lock()
        self._printed_at = self.begun
        self._printed_share = 0.0
        self._interval = _VERBOSE_SECONDS if is_verbose else _LINE_SECONDS
        self._step = 0.0 if is_verbose else _LINE_SHARE

    def advance(self, amount: float = 1) -> None:
        super().advance(amount)
        now = time.monotonic()
        with self._printing:
            share = self.share
            if (
                now - self._printed_at < self._interval
                or share - self._printed_share < self._step
                or not self.is_counted
            ):
                return
            self._printed_at, self._printed_share = now, share
        facts = f", {self.facts}" if self.facts else ""
        self._say(f"{self.title}: {share:.0%}{facts}")
