"""Ctrl-C: acknowledged at once, whatever the main thread does; a second one ends the process.

Python runs signal handlers between two instructions of the main thread, so that a long call into
torch would delay them. The bytes that Python writes for each signal (`signal.set_wakeup_fd`) are
read here by a thread of its own.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable

from reap2gguf.machine import processes
from reap2gguf.terminal.console import say
from reap2gguf.terminal.display import display

_ACKNOWLEDGED = "Interrupted: stopping; press Ctrl-C again to stop at once."
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_PATIENCE_SECONDS = 1.0
INTERRUPTED = 130  # the exit code


class Interrupts:
    """Watches for signals from `watch` on. Use it in the main thread only."""

    def __init__(self) -> None:
        self._farewell: Callable[[], None] = lambda: None
        self._is_watching = False
        self._has_ended = False  # whether the last words are printed
        self._printing = threading.Lock()

    def watch(self) -> None:
        """Turn the first signal into a KeyboardInterrupt, and a second Ctrl-C into the end."""
        read, write = socket.socketpair()
        write.setblocking(False)
        signal.set_wakeup_fd(write.detach(), warn_on_full_buffer=False)
        for number in _SIGNALS:
            signal.signal(number, self._raise)
        self._is_watching = True
        threading.Thread(target=self._listen, args=(read,), daemon=True, name="signals").start()

    def at_end(self, farewell: Callable[[], None]) -> None:
        """What to print before a second Ctrl-C ends the process."""
        self._farewell = farewell
        self._has_ended = False

    def end(self) -> None:
        """Print the last words, once; the acknowledgement does not follow them any more."""
        # the other thread may hang in a terminal that takes no more text
        has_lock = self._printing.acquire(timeout=_PATIENCE_SECONDS)
        try:
            if not self._has_ended:
                self._has_ended = True
                self._farewell()
        finally:
            if has_lock:
                self._printing.release()

    def release(self) -> None:
        """Give Ctrl-C back to a command that has a use for it, such as to stop an answer."""
        if self._is_watching:
            self._is_watching = False
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _raise(self, number: int, frame: object) -> None:
        """End in order, and resumable."""
        for one in _SIGNALS if self._is_watching else (number,):
            signal.signal(one, _ignore)
        display.interrupt()

    def _listen(self, read: socket.socket) -> None:
        """Acknowledge the first signal, and end the process at a second Ctrl-C."""
        is_stopping = False
        while numbers := read.recv(64):
            for number in numbers:
                if number not in _SIGNALS:
                    continue
                if is_stopping and number == signal.SIGINT:
                    self._end_now()
                with self._printing:
                    if not is_stopping and not self._has_ended and processes().is_first:
                        _acknowledge()
                is_stopping = True

    def _end_now(self) -> None:
        """What is half done stays as after a kill, and can be resumed."""
        try:
            display.end()
            self.end()
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(INTERRUPTED)


def _acknowledge() -> None:
    """Above what moves on the terminal, or else on a line of its own."""
    if (live := display.live) is not None:
        live.note(_ACKNOWLEDGED)
    else:
        say(_ACKNOWLEDGED, "error")


def _ignore(number: int, frame: object) -> None:
    """Nothing, but unlike SIG_IGN the thread above hears of the signal."""


interrupts = Interrupts()  # of this process
