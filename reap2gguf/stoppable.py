"""Work in several threads that ends soon when one of them fails.

A thread that computes reports its progress all the time. So a stop reaches it there, or where it
waits for another one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from reap2gguf.progress import Progress, Task


class Stopped(BaseException):
    """Ends work because other work failed that runs beside it. The other error is shown."""


class Joint:
    """What threads that work together share: which work is not done, and whether to stop."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._running: set[str] = set()
        self._is_stopped = False

    def begin(self, names: Collection[str]) -> None:
        """Some pieces of work are under way from now on."""
        with self._changed:
            self._running.update(names)

    def end(self, name: str) -> None:
        """A piece of work is done."""
        with self._changed:
            self._running.discard(name)
            self._changed.notify_all()

    def stop(self) -> None:
        """Let every thread end soon."""
        with self._changed:
            self._is_stopped = True
            self._changed.notify_all()

    def check(self) -> None:
        """Raises Stopped from `stop` on."""
        if self._is_stopped:
            raise Stopped

    def wait(self, names: Collection[str]) -> None:
        """Wait until pieces of work are done; Stopped if everything has to end."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_stopped or self._running.isdisjoint(names))
            self.check()

    @property
    def running(self) -> frozenset[str]:
        """The work that is under way."""
        with self._changed:
            return frozenset(self._running)


class StoppableProgress:
    """A Progress whose tasks raise Stopped once the work has to end."""

    def __init__(self, listener: Progress, joint: Joint) -> None:
        self.listener = listener
        self._check = joint.check

    @contextmanager
    def task(self, title: str, total: float, unit: str) -> Iterator[Task]:
        self._check()
        with self.listener.task(title, total, unit) as task:
            yield _StoppableTask(task, self._check)

    def note(self, text: str) -> None:
        self.listener.note(text)


class _StoppableTask:
    def __init__(self, task: Task, check: Callable[[], None]) -> None:
        self._task = task
        self._check = check

    def advance(self, amount: float = 1) -> None:
        self._check()
        self._task.advance(amount)

    def at(self, place: str) -> None:
        self._check()
        self._task.at(place)
