"""A lock that one process holds on an open file or folder.

The kernel drops it when the process ends, however it ends: a killed one keeps nobody out.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable
from pathlib import Path

# some file systems of a network cannot lock; work there goes on as if no other process were there
_UNABLE = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}
_MOST_DIGITS = 20  # of the number of a process


class Held(Exception):
    """Another process holds the lock: its number, or "unknown"."""


def hold(path: Path, open_file: Callable[[Path], int]) -> int:
    """Open a file and lock it until the descriptor, which is returned, is closed.

    The file gets the number of this process. One that its holder removes meanwhile is made again.
    Raises Held if another process has the lock, and OSError.
    """
    while True:
        descriptor = open_file(path)
        try:
            if not take(descriptor, where_unable=True):
                found = os.pread(descriptor, _MOST_DIGITS, 0).decode("ascii", "replace").strip()
                raise Held(found or "unknown")
            if is_at(descriptor, path):
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, str(os.getpid()).encode(), 0)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def take(descriptor: int, *, where_unable: bool) -> bool:
    """Lock an open file or folder until it is closed; whether no other process holds it.

    `where_unable` is the answer where the file system cannot lock. Raises OSError.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _UNABLE:
            raise
        return where_unable
    return True


def is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file or folder still has its name, or was removed meanwhile."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except OSError:
        return False
