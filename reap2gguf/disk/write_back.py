"""Sends what is written to the disk while more is being written.

A system keeps written bytes in memory and sends them to the disk later. Then a flush at the end of
a large file waits for gigabytes, and the disk was idle before. So the system is asked to begin
after every 16 MiB. Linux has `sync_file_range` for that, which waits only while the disk's queue is
full. Elsewhere, such as on macOS, the file is flushed after every 256 MiB.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from functools import cache
from threading import Lock

STEP_BYTES = 2**24  # between two calls of sync_file_range
FLUSH_BYTES = 2**28  # between two flushes, where there is no sync_file_range
_SYNC_FILE_RANGE_WRITE = 2
_Begin = Callable[[int, int, int, int], int]


class WriteBack:
    """Counts what is written to one file, and lets the disk begin from time to time.

    Threads may share it.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._n_bytes = 0  # since the last time
        self._error: OSError | None = None

    def wrote(self, descriptor: int, n_bytes: int) -> None:
        """Raises OSError if the file is flushed here and that fails."""
        begin = sync_file_range()
        with self._lock:
            self._n_bytes += n_bytes
            if self._n_bytes < (STEP_BYTES if begin else FLUSH_BYTES):
                return
            self._n_bytes = 0
        if begin is not None:
            # what the disk cannot do, the flush at the end reports
            begin(descriptor, 0, 0, _SYNC_FILE_RANGE_WRITE)
        else:
            self._flush(descriptor)

    def _flush(self, descriptor: int) -> None:
        try:
            os.fsync(descriptor)
        except OSError as error:
            self._error = error
            raise

    def check(self) -> None:
        """Raise the OSError of an earlier flush again: the next one would not report that loss."""
        if self._error is not None:
            raise self._error


@cache
def sync_file_range() -> _Begin | None:
    """Linux's function of that name, called without the interpreter's lock; None elsewhere."""
    if not sys.platform.startswith("linux"):
        return None
    function = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if function is None:
        return None
    function.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    function.restype = ctypes.c_int
    begin: _Begin = function
    return begin
