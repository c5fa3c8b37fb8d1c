"""Files of the user's, opened so that no pipe or device can hold the program up."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO


def open_regular(path: Path) -> BinaryIO:
    """A file opened for reading. Raises OSError, also for what is no regular file."""
    file = open(path, "rb", opener=_without_waiting)  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "it is no regular file")
    return file


def _without_waiting(path: str, flags: int) -> int:
    # a named pipe would wait here for its writer
    return os.open(path, flags | os.O_NONBLOCK)
