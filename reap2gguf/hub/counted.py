"""What has come of a file, told to a progress bar; and leaving a download that nobody wants."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from reap2gguf.hub.snapshot import Note


class LeavingError(BaseException):
    """What is fetched is wanted no more."""


class Counted:
    """Counts a file's bytes once, however often huggingface_hub begins it anew."""

    def __init__(self, advance: Callable[[int], None], leaving: threading.Event) -> None:
        self._advance = advance
        self._leaving = leaving
        self._most = 0  # that came in any try
        self._now = 0  # in this one

    def check(self) -> None:
        """LeavingError if nobody waits for the file."""
        if self._leaving.is_set():
            raise LeavingError

    def sleep(self, seconds: float) -> None:
        """Wait, as long as anybody does."""
        self._leaving.wait(seconds)
        self.check()

    def tells(self, note: Note) -> Note:
        """The same note, as long as anybody waits for the file."""

        def tell(text: str) -> None:
            self.check()
            note(text)

        return tell

    def bar(self) -> Any:
        """A class of progress bars for one try."""
        from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]

        counted = self
        self._now = 0

        class Bar(tqdm):
            def __init__(self, *arguments: Any, **named: Any) -> None:
                super().__init__(*arguments, **{**named, "disable": True})  # type: ignore[no-untyped-call]

            def update(self, n: float | None = 1) -> None:
                counted.count(int(n or 0))

            # a bar that has these is told apart what hf_xet receives and what it has written
            def update_transfer(self, n: float | None = 1) -> None:
                counted.check()

            def set_transfer_postfix_str(self, *arguments: Any, **named: Any) -> None:
                """Nothing is drawn."""

        return Bar

    def finish(self, n_bytes: int) -> None:
        """A file of so many bytes is there, though another process may have fetched it."""
        self._now = 0
        self.count(n_bytes)

    def count(self, n_bytes: int) -> None:
        """Bytes have come, or are given back where a download begins anew."""
        self.check()
        self._now += n_bytes
        if self._now > self._most:
            self._advance(self._now - self._most)
            self._most = self._now
