"""Temporary folders that nothing outlives: the next one that is made removes those of the dead.

Each is locked by the process that has made it, and the kernel drops the lock with the process,
however it ends. So a folder of this program that nobody holds was left by a killed process, and a
living process never loses its own.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from reap2gguf.disk.lock import is_at, take
from reap2gguf.errors import OutputError

_PREFIX = "reap2gguf-work-"
_AS_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW


class TemporaryFolder:
    """A new folder, there as long as this object is and no longer than the process.

    Raises OutputError if none can be made.
    """

    def __init__(self) -> None:
        try:
            parent = Path(tempfile.gettempdir())
            _remove_dead(parent)
            self.path, descriptor = _made(parent)
        except OSError as error:
            raise OutputError(
                f"no temporary folder can be made ({error.strerror or error}); free some space, or "
                "set TMPDIR to a folder that can be written"
            ) from error
        self._end = weakref.finalize(self, _end, self.path, descriptor, os.getpid())

    def remove(self) -> None:
        """Remove the folder with its contents, now."""
        self._end()


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A new folder, removed at the end of the block. Raises OutputError if none can be made."""
    folder = TemporaryFolder()
    try:
        yield folder.path
    finally:
        folder.remove()


def _made(parent: Path) -> tuple[Path, int]:
    """A locked folder and its descriptor."""
    while True:
        path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent)).resolve()
        descriptor = os.open(path, _AS_FOLDER)
        # before it was locked, another process may have taken it for one of the dead
        if take(descriptor, where_unable=True) and is_at(descriptor, path):
            return path, descriptor
        os.close(descriptor)


def _end(path: Path, descriptor: int, process: int) -> None:
    if os.getpid() == process:  # and not a copy of it
        _remove(path)
    os.close(descriptor)


def _remove_dead(parent: Path) -> None:
    """Remove the folders whose processes have ended. What cannot be locked or removed stays."""
    for path in parent.glob(f"{_PREFIX}*"):
        with suppress(OSError):  # it went meanwhile, is a link, or is of another user
            descriptor = os.open(path, _AS_FOLDER)
            try:
                is_mine = os.fstat(descriptor).st_uid == os.getuid()
                if is_mine and take(descriptor, where_unable=False) and is_at(descriptor, path):
                    _remove(path)
            finally:
                os.close(descriptor)


def _remove(folder: Path) -> None:
    try:
        shutil.rmtree(folder)
    except (OSError, RecursionError):
        # a program may nest folders deeper than shutil.rmtree can, and take rights away from them
        for command in (("chmod", "-R", "u+rwx"), ("rm", "-rf")):
            subprocess.run([*command, "--", folder], stderr=subprocess.DEVNULL, check=False)
