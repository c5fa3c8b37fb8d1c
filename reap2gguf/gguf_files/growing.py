"""The entries of an importance matrix that is still being computed.

Names and shapes are those of the model, so they are known before the first layer. An entry comes
with its layer. Whoever reads it earlier waits, and holds no lock meanwhile.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from reap2gguf.stoppable import Stopped

if TYPE_CHECKING:
    from reap2gguf.gguf_files.imatrix import ImatrixEntry


class GrowingEntries(Mapping[str, "ImatrixEntry"]):
    """Entries by GGUF tensor name, each from when it is final; threads may share them.

    Whether a name has an entry, and how many there are, is known at once.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, int]]) -> None:
        self._shapes = dict(shapes)  # rows and columns of the sums
        self._final: dict[str, ImatrixEntry] = {}
        self._changed = threading.Condition()
        self._is_stopped = False
        self.n_readers = 1  # threads that read entries
        self.seconds_idle = 0.0  # while each of them waited
        self._n_waiting = 0

    def __getitem__(self, name: str) -> ImatrixEntry:
        """An entry, once it is final. Raises Stopped if it will never be."""
        if name not in self._shapes:
            raise KeyError(name)
        if name not in self._final:
            self._wait(name)
        return self._final[name]

    def _wait(self, name: str) -> None:
        with self._changed:
            self._n_waiting += 1
            begun = time.monotonic() if self._n_waiting == self.n_readers else None
            self._changed.wait_for(lambda: self._is_stopped or name in self._final)
            if begun is not None:  # the last that came; when it continues, so do others
                self.seconds_idle += time.monotonic() - begun
            self._n_waiting -= 1
            if name not in self._final:
                raise Stopped

    def __contains__(self, name: object) -> bool:
        return name in self._shapes

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def shape(self, name: str) -> tuple[int, int]:
        """Rows and columns of an entry, final or not."""
        return self._shapes[name]

    def is_final(self, name: str) -> bool:
        """Whether an entry is there, so that no one waits for it."""
        return name in self._final

    def publish(self, entry: ImatrixEntry) -> None:
        """An entry is final. Raises ValueError if it is none of those that were announced."""
        if self._shapes.get(entry.name) != entry.sums.shape:
            raise ValueError(f"an entry {entry.sums.shape} for {entry.name} was not announced")
        with self._changed:
            self._final[entry.name] = entry
            self._changed.notify_all()

    def stop(self) -> None:
        """Stop all who wait, or will: no entry comes any more, or nobody needs one."""
        with self._changed:
            self._is_stopped = True
            self._changed.notify_all()

    @contextmanager
    def filled(self) -> Iterator[None]:
        """Publish all entries inside; if that fails, those who wait are stopped."""
        try:
            yield
        except BaseException:
            self.stop()
            raise


def entry_shape(entries: Mapping[str, ImatrixEntry], name: str) -> tuple[int, int]:
    """Rows and columns of an entry's sums, also of one that is still being computed."""
    if isinstance(entries, GrowingEntries):
        return entries.shape(name)
    rows, columns = entries[name].sums.shape
    return rows, columns
