"""How stages report progress, without knowing who listens."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal, Protocol


class Task(Protocol):
    """One running piece of work."""

    def advance(self, amount: float = 1) -> None:
        """`amount` more units are done."""

    def at(self, place: str) -> None:
        """Where the work is now, such as "layer 12/48"."""


class Progress(Protocol):
    """Receives what the stages are doing; a terminal draws it, a program gets events."""

    @contextmanager
    def task(self, title: str, total: float, unit: str) -> Iterator[Task]:
        """A piece of work of `total` units, open while the context is; tasks may overlap.

        A total of 0 is work that nobody counts, such as loading a library; see `working`.
        """
        yield ...  # type: ignore[misc]

    def note(self, text: str) -> None:
        """A line to read once, such as a fallback that was taken."""


@contextmanager
def working(progress: Progress, title: str) -> Iterator[None]:
    """Announce work that takes a while and is not counted, before it begins."""
    with progress.task(title, 0, ""):
        yield


# the title of work that compiles or tunes kernels, whose results a cache on disk keeps
COMPILING = "Compiling kernels, once on this machine"
_LONG = 2.0  # seconds; loading what was compiled before takes less


@contextmanager
def working_if_long(progress: Progress, title: str, seconds: float = _LONG) -> Iterator[None]:
    """Announce work that is not counted, if it takes longer than `seconds`."""
    is_done = threading.Event()

    def announce() -> None:
        if not is_done.wait(seconds):
            with working(progress, title):
                is_done.wait()

    thread = threading.Thread(target=announce, name="announcing", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_done.set()
        thread.join()


@dataclass(frozen=True)
class ProgressEvent:
    """One report about a task, or a note. A note has only a text.

    The text of a task says where the work is, such as "layer 12/48". A total of 0 is work that is
    not counted.
    """

    kind: Literal["begin", "advance", "end", "note"]
    title: str = ""
    done: float = 0.0  # units so far
    total: float = 0.0
    unit: str = ""  # such as "bytes", or "tokens": those of the text, however many layers
    text: str = ""


class CallbackProgress:
    """A Progress that calls one function with each event.

    Tasks may advance in several threads at the same time. The function is called by one thread at a
    time, in the thread that reports; it may use this object itself. An exception that it raises
    ends the work that reported.
    """

    def __init__(self, callback: Callable[[ProgressEvent], None]) -> None:
        self._callback = callback
        self._lock = threading.RLock()

    @contextmanager
    def task(self, title: str, total: float, unit: str) -> Iterator[Task]:
        begin = ProgressEvent("begin", title, 0.0, total, unit)
        task = _CallbackTask(begin, self._send, self._lock)
        self._send(task.latest)
        try:
            yield task
        finally:
            self._send(replace(task.latest, kind="end"))

    def note(self, text: str) -> None:
        self._send(ProgressEvent("note", text=text))

    def _send(self, event: ProgressEvent) -> None:
        with self._lock:
            self._callback(event)


class _CallbackTask:
    def __init__(
        self, begin: ProgressEvent, send: Callable[[ProgressEvent], None], lock: threading.RLock
    ) -> None:
        self.latest = begin
        self._send = send
        self._lock = lock

    def advance(self, amount: float = 1) -> None:
        with self._lock:  # counting and sending are one step: `done` never goes down
            done = self.latest.done + amount
            self.latest = replace(self.latest, kind="advance", done=done)
            self._send(self.latest)

    def at(self, place: str) -> None:
        with self._lock:
            self.latest = replace(self.latest, kind="advance", text=place)
            self._send(self.latest)


class _Nothing:
    def advance(self, amount: float = 1) -> None:
        """Ignored."""

    def at(self, place: str) -> None:
        """Ignored."""


class Silent:
    """A Progress that ignores everything."""

    @contextmanager
    def task(self, title: str, total: float, unit: str) -> Iterator[Task]:
        yield _Nothing()

    def note(self, text: str) -> None:
        """Ignored."""
