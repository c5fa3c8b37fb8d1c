"""Room on a disk, taken before it is needed."""

import errno
import os


def reserve(descriptor: int, n_bytes: int) -> None:
    """Give a file its length and its blocks, so that a full disk shows now; OSError if it does."""
    os.ftruncate(descriptor, n_bytes)
    if not hasattr(os, "posix_fallocate") or n_bytes == 0:
        return
    try:
        os.posix_fallocate(descriptor, 0, n_bytes)
    except OSError as error:
        # some file systems cannot reserve; the length is set, and writes will tell
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
