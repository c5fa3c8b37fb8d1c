"""SHA-256 of files, made while they are written.

Threads write the ranges of a file in any order and say so. One thread for each file follows the
part from its beginning that is complete, reads it back, out of the system's memory, and hashes it.
So the hash is there a moment after the last byte, and nothing is read from the disk again.

A hash is of the bytes that this program wrote, and it belongs to the file's size and time of change
right after the last of them. Whoever changes the file later changes that time, and the hash is not
used then. A change before that, while the program still writes, is found by what compares the
file's bytes: the verification of a build, or any later comparison with the hash.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Condition, Thread
from typing import TYPE_CHECKING

from reap2gguf.errors import OutputError
from reap2gguf.files import open_entry

if TYPE_CHECKING:
    from types import TracebackType

_BLOCK_BYTES = 2**22


@dataclass(frozen=True)
class WrittenHash:
    """The hash of a file, and what the file looked like after the last byte was written."""

    n_bytes: int
    changed_ns: int
    sha256: str


class FileHash:
    """Follows one file of a known size. Memory: 4 MiB."""

    def __init__(self, path: Path, descriptor: int, n_bytes: int) -> None:
        """`descriptor` must be open for reading; it may be closed before the hash is made."""
        self.path = path
        self._descriptor = os.dup(descriptor)
        self._n_bytes = n_bytes
        self._change = Condition()
        self._complete = 0  # bytes from the beginning that are written
        self._later: dict[int, int] = {}  # ranges after that, first to last
        self._is_stopped = False
        self._stat: os.stat_result | None = None  # after the last byte
        self._error: OSError | None = None
        self._sha256 = ""
        self._thread = Thread(target=self._run, name=f"hash {path.name}", daemon=True)
        self._thread.start()

    def wrote(self, first: int, last: int) -> None:
        """Bytes [first, last) are in the file; every byte belongs to one range."""
        if first == last:
            return
        with self._change:
            self._later[first] = last
            while (end := self._later.pop(self._complete, None)) is not None:
                self._complete = end
            self._change.notify()

    def finish(self) -> None:
        """The last byte is written. Raises OSError."""
        self._stat = os.fstat(self._descriptor)

    def stop(self) -> None:
        """Give up, and wait until the thread has ended."""
        with self._change:
            self._is_stopped = True
            self._change.notify()
        self._thread.join()
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def result(self) -> WrittenHash | None:
        """The hash, once all of it is written; None if the file at its name is another by now.

        Raises OutputError if it cannot be read back.
        """
        self._thread.join()
        if self._error is not None:
            reason = self._error.strerror or self._error
            raise OutputError(
                f"{self.path}: cannot be read back ({reason}); check the disk and run the command "
                "again"
            ) from self._error
        if self._stat is None or not self._sha256:
            return None
        try:
            now = os.stat(self.path, follow_symlinks=False)
        except OSError:  # whoever reads it next says so
            return None
        if _identity(now) != _identity(self._stat) or now.st_size != self._n_bytes:
            return None
        return WrittenHash(self._n_bytes, self._stat.st_mtime_ns, self._sha256)

    def _run(self) -> None:
        try:
            self._follow()
        except OSError as error:
            self._error = error

    def _follow(self) -> None:
        digest = hashlib.sha256()
        view = memoryview(bytearray(min(_BLOCK_BYTES, self._n_bytes)))
        done = 0
        while done < self._n_bytes:
            wanted = min(done + _BLOCK_BYTES, self._n_bytes)
            if not self._wait_for(wanted):
                return
            while done < wanted:
                count = os.preadv(self._descriptor, [view[: wanted - done]], done)
                if count == 0:
                    raise OSError(f"it ends after {done:,} of {self._n_bytes:,} bytes")
                digest.update(view[:count])
                done += count
        self._sha256 = digest.hexdigest()

    def _wait_for(self, n_bytes: int) -> bool:
        """Whether so many bytes are complete; False when it is to stop."""
        with self._change:
            self._change.wait_for(lambda: self._is_stopped or self._complete >= n_bytes)
            return not self._is_stopped


class Hashes:
    """The hashes of the files that are written while the context is open, by their final names.

    Memory: 4 MiB for each file.
    """

    def __init__(self) -> None:
        self._files: dict[Path, FileHash] = {}

    def __enter__(self) -> Hashes:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for file in self._files.values():
            file.stop()

    def follow(self, path: Path, descriptor: int, n_bytes: int) -> FileHash:
        """Begin with a file that will be `path`, of `n_bytes`, whose ranges are still to come."""
        if path in self._files:
            self._files.pop(path).stop()
        file = self._files[path] = FileHash(path, descriptor, n_bytes)
        return file

    def read(self, path: Path) -> None:
        """Begin to hash a file that is complete already. Raises OutputError."""
        try:
            with open_entry(path) as file:
                n_bytes = os.fstat(file.fileno()).st_size
                follower = self.follow(path, file.fileno(), n_bytes)
            follower.finish()
        except OSError as error:
            raise OutputError(
                f"{path}: cannot be read ({error.strerror or error}); check the disk and run the "
                "command again"
            ) from error
        follower.wrote(0, n_bytes)

    def found(self) -> Mapping[Path, WrittenHash]:
        """The hashes of all files, once they are made; without files that have changed since.

        Raises OutputError if one cannot be read back.
        """
        results = {path: file.result() for path, file in self._files.items()}
        return {path: one for path, one in results.items() if one is not None}


def _identity(stat: os.stat_result) -> tuple[int, int, int]:
    return stat.st_dev, stat.st_ino, stat.st_mtime_ns
