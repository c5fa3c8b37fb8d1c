"""How stages report progress, without knowing who listens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Task(Protocol):
    """One running piece of work."""

    def advance(self, amount: float = 1) -> None:
        """`amount` more units are done."""


class Progress(Protocol):
    """Receives what the stages are doing; the terminal draws it, tests ignore it."""

    @contextmanager
    def task(self, title: str, total: float, unit: str) -> Iterator[Task]:
        """A piece of work of `total` `unit`s, open while the context is."""
        yield ...  # type: ignore[misc]

    def note(self, text: str) -> None:
        """Something the user should read once, such as a fallback that was taken."""


class _Nothing:
    def advance(self, amount: float = 1) -> None:
        """Nobody watches."""


class Silent:
    """A Progress that tells nobody."""

    @contextmanager
    def task(self, title: str, total: float, unit: str) -> Iterator[Task]:
        yield _Nothing()

    def note(self, text: str) -> None:
        """Nobody reads."""
