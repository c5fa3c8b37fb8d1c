"""Which tensors of an export are on the disk, so that an interrupted one goes on from there.

The journal is a small JSON file beside the unfinished GGUF files. It is written anew now and then,
each time after the files were flushed, so that it never promises what a power cut could take back.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from reap2gguf.atomic import OutputFile, remove, write_whole
from reap2gguf.checkpoint.config import read_json
from reap2gguf.errors import CheckpointError

SAVE_SECONDS = 5.0  # at most so much work is lost
MOST_OF_TIME = 0.05  # that flushing may take


class ExportJournal:
    """The finished tensors of one export, which `key` tells from any other."""

    def __init__(self, path: Path, key: str) -> None:
        self._path = path
        self._key = key
        self._done = set(_read(path, key))
        self._saving = threading.Lock()
        self._saved_at = time.monotonic()
        self._cost = 0.0
        self._may_lie = False

    def __contains__(self, name: str) -> bool:
        return name in self._done

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to go on from."""
        return not self._done

    def forget(self) -> None:
        """Begin from nothing: the files are not those that were written."""
        self._done.clear()
        remove(self._path)

    def add(self, name: str, files: Sequence[OutputFile]) -> None:
        """A tensor is written to all files; now and then they are flushed, and that is kept."""
        self._done.add(name)
        if time.monotonic() - self._saved_at >= max(SAVE_SECONDS, self._cost / MOST_OF_TIME):
            self.save(files)

    def save(self, files: Iterable[OutputFile]) -> None:
        """Flush the files and keep what is done; OutputError if the disk refuses."""
        if self._may_lie or not self._saving.acquire(blocking=False):
            return  # or another thread is at it
        try:
            # a disk says once that it lost something: flushing again would seem to go well
            self._may_lie = True
            begun = time.monotonic()
            names = sorted(self._done.copy())
            for file in files:
                file.sync()
            write_whole(self._path, json.dumps({"key": self._key, "done": names}))
            self._saved_at = time.monotonic()
            self._cost = self._saved_at - begun
            self._may_lie = False
        finally:
            self._saving.release()


def _read(path: Path, key: str) -> Iterable[str]:
    """The names in a journal of this key; none if it is not there, damaged or of another export."""
    if not path.is_file():
        return ()
    try:
        values = read_json(path)
    except CheckpointError:
        return ()  # what it promised is written again
    names = values.get("done")
    if values.get("key") != key or not isinstance(names, list):
        return ()
    return (name for name in names if isinstance(name, str))
