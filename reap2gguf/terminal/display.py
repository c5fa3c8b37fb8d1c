"""What moves on the terminal now, for whoever prints or ends the process meanwhile."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

_SHOW_CURSOR = "\x1b[?25h"
_PATIENCE_SECONDS = 1.0


class Live(Protocol):
    """Bars, or anything else that is drawn again and again."""

    def note(self, text: str) -> None:
        """Print a line above it."""

    def close(self) -> None:
        """Erase it, and show the cursor. Any thread may call this."""


class Display:
    """The live part of the terminal, which hides the cursor; and interrupts that wait for it."""

    def __init__(self) -> None:
        self.live: Live | None = None
        self._n_holding = 0  # blocks of the main thread that are not interrupted
        self._is_interrupted = False

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Let an interrupt wait until the end of the block, where it raises KeyboardInterrupt.

        A display that is half started could not be ended.
        """
        if threading.current_thread() is not threading.main_thread():  # no other is interrupted
            yield
            return
        self._n_holding += 1
        try:
            yield
        finally:
            self._n_holding -= 1
            if self._is_interrupted and not self._n_holding:
                self._is_interrupted = False
                raise KeyboardInterrupt

    def interrupt(self) -> None:
        """Raise KeyboardInterrupt, now or at the end of `changing`. For a signal's handler."""
        if not self._n_holding:
            raise KeyboardInterrupt
        self._is_interrupted = True

    def end(self) -> None:
        """Erase what moves, and show the cursor, before the process ends.

        Waits a second at most: another thread may hang in a terminal that takes no more text.
        """
        live, self.live = self.live, None
        if live is None:
            return
        closing = threading.Thread(target=live.close, daemon=True)
        closing.start()
        closing.join(_PATIENCE_SECONDS)
        if closing.is_alive() and sys.stderr.isatty():
            print(_SHOW_CURSOR, file=sys.stderr, flush=True)


display = Display()  # of this process
