"""Which tensors of an export are on the disk, so that an interrupted export can resume.

The journal is a small JSON file beside the unfinished GGUF files. From time to time the files are
flushed and then it is rewritten, so that it lists only what a power cut cannot destroy.

With each tensor it keeps a digest of the importance that it was quantized with. An export may run
beside the sweep that computes the importance: after a kill of both, a sweep that starts again may
end in other last bits, and then what was written with the earlier ones is written again.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from reap2gguf.atomic import OutputFile, remove, write_whole
from reap2gguf.checkpoint.config import read_json
from reap2gguf.errors import CheckpointError

SAVE_SECONDS = 5.0  # of work that is lost at most, if flushing is quick
MAX_TIME_SHARE = 0.05  # of the export that flushing may take


class ExportJournal:
    """The finished tensors of one export, which `key` identifies."""

    def __init__(self, path: Path, key: str) -> None:
        self._path = path
        self._key = key
        self._done = _read(path, key)
        self._saving = threading.Lock()
        self._saved_at = time.monotonic()
        self._cost = 0.0
        self._flush_failed = False

    def __contains__(self, name: str) -> bool:
        return name in self._done

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to resume from."""
        return not self._done

    def holds(self, name: str, digest: str) -> bool:
        """Whether a tensor is written with the importance of a digest; "" for none."""
        return self._done.get(name) == digest

    def forget(self, name: str) -> None:
        """A tensor will be written again: its bytes are not to be relied on from now on."""
        with self._saving:
            if self._done.pop(name, None) is not None and self._path.is_file():
                self._write(self._done.copy())

    def clear(self) -> None:
        """Start from scratch: the files are not those that were written."""
        self._done.clear()
        remove(self._path)

    def add(self, name: str, digest: str, files: Sequence[OutputFile]) -> None:
        """Record that a tensor is written to all files; from time to time, flush and save."""
        self._done[name] = digest
        if time.monotonic() - self._saved_at >= max(SAVE_SECONDS, self._cost / MAX_TIME_SHARE):
            self.save(files)

    def save(self, files: Iterable[OutputFile]) -> None:
        """Flush the files and save what is done; OutputError if the disk refuses."""
        if self._flush_failed or not self._saving.acquire(blocking=False):
            return  # or another thread is saving
        try:
            # until it succeeds: a disk reports a loss once, and a second flush would hide it
            self._flush_failed = True
            begun = time.monotonic()
            done = self._done.copy()
            for file in files:
                file.sync()
            self._write(done)
            self._saved_at = time.monotonic()
            self._cost = self._saved_at - begun
            self._flush_failed = False
        finally:
            self._saving.release()

    def _write(self, done: Mapping[str, str]) -> None:
        write_whole(self._path, json.dumps({"key": self._key, "done": dict(sorted(done.items()))}))


def _read(path: Path, key: str) -> dict[str, str]:
    """What a journal of this key holds; nothing if it is missing, damaged or of another export."""
    if not path.is_file():
        return {}
    try:
        values = read_json(path)
    except CheckpointError:
        return {}  # its tensors are written again
    done = values.get("done")
    if values.get("key") != key or not isinstance(done, dict):
        return {}
    return {name: digest for name, digest in done.items() if isinstance(digest, str)}
