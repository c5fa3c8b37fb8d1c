"""Progress on a terminal: one live line per running task, below everything that is printed."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.cells import cell_len, set_cell_size
from rich.console import Console, Group
from rich.live import Live
from rich.spinner import Spinner
from rich.text import Text

from reap2gguf.messages import one_line, without_password, wrapped
from reap2gguf.terminal.display import display
from reap2gguf.terminal.meter import Meter

if TYPE_CHECKING:
    from reap2gguf.progress import Task

_LONGEST_BAR = 40
_SHORTEST_BAR = 8
_SHORT_SECONDS = 1.0


class Bars:
    """Live bars, one below the other where tasks run at the same time.

    A task that ends leaves a line of text. One that fails, is short or is not counted leaves none.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._lock = threading.Lock()
        # Replaced, never changed: the thread that draws reads it without the lock, which a thread
        # may hold that waits for the drawing to end.
        self._open: tuple[Meter, ...] = ()
        self._live: Live | None = None
        self._spinner = Spinner("line" if self._is_ascii else "dots")

    @property
    def _is_ascii(self) -> bool:
        return self._console.options.ascii_only

    @contextmanager
    def task(self, title: str, total: float, unit: str) -> Iterator[Task]:
        meter = Meter(title, total, unit)
        try:
            with display.changing():
                self._enter(meter)
            yield meter
        finally:
            with display.changing():
                self._leave(meter)
        if meter.is_counted and meter.seconds >= _SHORT_SECONDS:
            self.note(meter.summary)

    def note(self, text: str) -> None:
        lines = wrapped(one_line(without_password(text)), self._console.width)
        self._console.print(lines, highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        """End the display in the middle of its tasks. Any thread may call this."""
        # without the lock, which a thread may hold that waits for a terminal
        if (live := self._live) is not None:
            live.stop()

    def _enter(self, meter: Meter) -> None:
        """Show a task; the first of several starts the display."""
        with self._lock:
            self._open = (*self._open, meter)
            if self._live is None:
                self._live = Live(
                    console=self._console,
                    get_renderable=self._lines,
                    refresh_per_second=10,
                    transient=True,
                    redirect_stdout=False,  # results may go to a file
                )
                display.live = self
                self._live.start(refresh=True)

    def _leave(self, meter: Meter) -> None:
        """Remove a task; the last of several ends the display."""
        with self._lock:
            self._open = tuple(one for one in self._open if one is not meter)
            if not self._open and self._live is not None:
                self._live.stop()
                self._live = None
                if display.live is self:
                    display.live = None

    def _lines(self) -> Group:
        """Every bar; where there is none, the newest task that is not counted."""
        counted = [meter for meter in self._open if meter.is_counted]
        width = self._console.width - 1  # a full line would break in some terminals
        if not counted and self._open:
            words = set_cell_size(f"{self._open[-1].title} ...", width - 2).rstrip()
            self._spinner.update(text=Text(words, no_wrap=True))
            return Group(self._spinner)
        return Group(*(bar_line(meter, width, self._is_ascii) for meter in counted))


def bar_line(meter: Meter, width: int, is_ascii: bool = False) -> Text:
    """A task in one line of at most `width` columns: title, bar, share and facts.

    Where there is little room the bar gets shorter, then the title, and then the end is cut.
    """
    share = f"{meter.share:>4.0%}"
    facts = f"  {meter.facts}" if meter.facts else ""
    room = max(width - len(share) - cell_len(facts) - 2, 0)  # for title, a space, and bar
    title = _shortened(meter.title, max(room - _SHORTEST_BAR - 1, 0), is_ascii)
    length = min(room - cell_len(title) - 1, _LONGEST_BAR)
    mark = "-" if is_ascii else "\N{BOX DRAWINGS HEAVY HORIZONTAL}"
    n_full = int(meter.share * max(length, 0))
    line = Text(no_wrap=True, overflow="crop")
    line.append(f"{title} ")
    line.append(mark * n_full, "bar.complete")
    empty = " " if is_ascii else mark
    line.append(empty * (length - n_full), "bar.back")
    line.append(f" {share}")
    line.append(facts, "progress.remaining")
    line.truncate(width)
    return line


def _shortened(text: str, width: int, is_ascii: bool) -> str:
    """A text without its middle, if it is wider than `width`."""
    if cell_len(text) <= width:
        return text
    gap = "..." if is_ascii else "\N{HORIZONTAL ELLIPSIS}"
    half = max(width - len(gap), 0) // 2
    return f"{text[:half]}{gap}{text[len(text) - half :]}"
