"""Files that are whole or not there, on disks that may be full, broken or gone.

Everything that the program writes goes through here. A file is written under its name with `.part`
at the end, flushed to the disk, and renamed: a final name is that of a complete file whatever
happens in between, a power cut included. Errors of the disk become one OutputError that says what
to do.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from reap2gguf.errors import OutputError

Bytes = bytes | bytearray | memoryview
PART = ".part"
_WRITE_BYTES = 2**30  # the kernel moves at most 2 GiB a call
_COPY_BYTES = 2**22
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}


@contextmanager
def disk_errors_told(path: Path, problem: str = "cannot be written") -> Iterator[None]:
    """Turn an OSError of the block into an OutputError about `path`, with advice."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            advice = "free some space there and run the command again"
        elif error.errno in _FORBIDDEN:
            advice = "pass another output, or change its permissions"
        else:
            advice = "see that the disk is there and sound, and run the command again"
        raise OutputError(f"{path}: {problem} ({error.strerror or error}); {advice}") from error


@dataclass(frozen=True)
class OutputFile:
    """An open file; what it is to be called is what errors name."""

    path: Path
    descriptor: int

    def write(self, data: Bytes) -> None:
        """Append bytes, all of them."""
        view = memoryview(data).cast("B")
        done = 0
        with disk_errors_told(self.path):
            while done < len(view):
                done += os.write(self.descriptor, view[done : done + _WRITE_BYTES])

    def write_at(self, data: Bytes, position: int) -> None:
        """Put bytes at a position, all of them; threads may do so side by side."""
        view = memoryview(data).cast("B")
        done = 0
        with disk_errors_told(self.path):
            while done < len(view):
                piece = view[done : done + _WRITE_BYTES]
                done += os.pwrite(self.descriptor, piece, position + done)

    def reserve(self, n_bytes: int) -> None:
        """Give the file its length and its blocks, so that a full disk shows now."""
        with disk_errors_told(self.path, f"no room for {n_bytes:,} bytes"):
            reserve(self.descriptor, n_bytes)

    def sync(self) -> None:
        """Have the disk keep what was written."""
        with disk_errors_told(self.path):
            os.fsync(self.descriptor)


@contextmanager
def whole_file(path: Path) -> Iterator[OutputFile]:
    """A new file that takes its name, in place of any other, when the block ends well.

    Raises OutputError if it cannot be written, and then leaves nothing behind.
    """
    part = part_of(path)
    try:
        with open_file(part, path, os.O_TRUNC) as file:
            yield file
            file.sync()
        rename(part, path)
    except BaseException:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise


def part_of(path: Path) -> Path:
    """The name of a file until it is whole."""
    return path.with_name(path.name + PART)


@contextmanager
def open_file(path: Path, shown: Path, flags: int = 0) -> Iterator[OutputFile]:
    """A file that is there or is made, to be written; errors call it `shown`."""
    with disk_errors_told(shown):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | flags, 0o666)
    try:
        yield OutputFile(shown, descriptor)
    except BaseException:
        with suppress(OSError):  # the error under way says more
            os.close(descriptor)
        raise
    with disk_errors_told(shown):
        os.close(descriptor)


def write_whole(path: Path, data: Bytes | str) -> None:
    """A small file, whole or not at all; text as UTF-8."""
    with whole_file(path) as file:
        file.write(data.encode("utf-8") if isinstance(data, str) else data)


def copy_whole(source: Path, path: Path) -> None:
    """A copy of a file, whole or not at all."""
    told = disk_errors_told(source, "cannot be read")
    with whole_file(path) as file, told, source.open("rb") as original:
        while piece := original.read(_COPY_BYTES):
            file.write(piece)


def rename(old: Path, new: Path) -> None:
    """Give a file or folder another name, and have the disk keep it so."""
    with disk_errors_told(new):
        os.replace(old, new)
        for folder in {old.parent, new.parent}:
            sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Have the disk keep the names in a folder; OSError if it fails."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some file systems have no such thing
            raise
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """A folder and those above it, where they are not there yet."""
    with disk_errors_told(folder):
        if not folder.is_dir():
            folder.mkdir(parents=True, exist_ok=True)
            sync_folder(folder.parent)


def remove(path: Path) -> None:
    """Remove a file or a folder with all that it holds, if it is there."""
    with disk_errors_told(path, "cannot be removed"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


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
