"""Writing files whole or not at all, to disks that may be full, broken or gone.

All files that remain are written through this module; `files.py` is the reading side. A file is
written under its name with `.part` at the end, flushed to the disk, and renamed: so a file with its
final name is complete, whatever happens in between, even a power cut. Links are replaced and never
followed, since other people may write to a shared folder. Errors of the disk become one OutputError
that says what to do.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from reap2gguf.disk.lock import Held, hold
from reap2gguf.disk.write_back import WriteBack
from reap2gguf.errors import OutputError
from reap2gguf.files import open_entry, what_it_is

if TYPE_CHECKING:
    from reap2gguf.disk.hashing import FileHash, Hashes

Bytes = bytes | bytearray | memoryview
PART = ".part"
# per call: in a longer one Linux fills pages of 2 MiB, which a virtual machine may have to ask its
# host for; measured 0.65 GB/s with 4 MiB, 2.2 GB/s with 1 MiB
_WRITE_BYTES = 2**20
_COPY_BYTES = 2**22
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}


@contextmanager
def output_errors(path: Path, problem: str = "cannot be written") -> Iterator[None]:
    """Turn an OSError of the block into an OutputError about `path`, with advice."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            advice = "free some space there and run the command again"
        elif error.errno in _FORBIDDEN:
            advice = "pass another output, or change its permissions"
        else:
            advice = "check the disk and run the command again"
        raise OutputError(f"{path}: {problem} ({error.strerror or error}); {advice}") from error


@dataclass(frozen=True)
class OutputFile:
    """An open file; errors name its final path. What is written goes to the disk early."""

    path: Path
    descriptor: int
    hashed: FileHash | None = None  # what hashes it while it is written
    _early: WriteBack = field(default_factory=WriteBack, repr=False)

    def hashed_by(self, hashes: Hashes | None, n_bytes: int) -> OutputFile:
        """The same file, which will have `n_bytes`; its hash is made while it is written.

        Then every byte is written by `write_at`, or `FileHash.wrote` is told of it.
        """
        if hashes is None:
            return self
        with output_errors(self.path):
            return replace(self, hashed=hashes.follow(self.path, self.descriptor, n_bytes))

    def write(self, data: Bytes) -> None:
        """Append all of the bytes."""
        view = memoryview(data).cast("B")
        done = 0
        with output_errors(self.path):
            while done < len(view):
                done += os.write(self.descriptor, view[done : done + _WRITE_BYTES])
            self._early.wrote(self.descriptor, len(view))

    def write_at(self, data: Bytes, position: int) -> None:
        """Write all of the bytes at a position; several threads may do so at once."""
        view = memoryview(data).cast("B")
        done = 0
        with output_errors(self.path):
            while done < len(view):
                block = view[done : done + _WRITE_BYTES]
                done += os.pwrite(self.descriptor, block, position + done)
            self._early.wrote(self.descriptor, len(view))
        if self.hashed is not None:
            self.hashed.wrote(position, position + len(view))

    def reserve(self, n_bytes: int) -> None:
        """Set the file's length and reserve its blocks, so that a full disk is an error now."""
        with output_errors(self.path, f"no room for {n_bytes:,} bytes"):
            reserve(self.descriptor, n_bytes)

    def sync(self) -> None:
        """Flush the file to the disk."""
        with output_errors(self.path):
            self._early.check()
            os.fsync(self.descriptor)

    def finish(self) -> None:
        """Flush the file to the disk after its last byte."""
        if self.hashed is not None:
            with output_errors(self.path):
                self.hashed.finish()
        self.sync()


@contextmanager
def whole_file(path: Path) -> Iterator[OutputFile]:
    """A new file that gets its name, and replaces any other, when the block ends without an error.

    Raises OutputError if it cannot be written; nothing is left behind then.
    """
    part = part_of(path)
    check_replaceable(path)
    try:
        with open_file(part, path) as file:
            yield file
            file.sync()
        rename(part, path)
    except BaseException:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise


def part_of(path: Path) -> Path:
    """The name of a file until it is complete."""
    return path.with_name(path.name + PART)


@contextmanager
def open_file(path: Path, shown: Path, resume: bool = False) -> Iterator[OutputFile]:
    """Open a new file for writing, or with `resume` the one that is there; errors name it `shown`.

    Raises OutputError if it cannot be written, or if what is to be resumed is not its own file.
    """
    with output_errors(shown):
        descriptor = open_own(path) if resume else _open_new(path)
    try:
        yield OutputFile(shown, descriptor)
    except BaseException:
        with suppress(OSError):  # the first error says more
            os.close(descriptor)
        raise
    with output_errors(shown):
        os.close(descriptor)


def _open_new(path: Path) -> int:
    """A new file in place of any other, or of a link."""
    check_replaceable(path)
    path.unlink(missing_ok=True)
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)


def open_own(path: Path) -> int:
    """Open a file to read and write it, and create it if it is missing; the descriptor.

    Raises OSError, also for a link, a pipe, or a file that has a second name elsewhere: writing to
    it would change a file that is not of this program.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        descriptor = os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(errno.ELOOP, "a link, expected a file; remove it") from error
        raise
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a file of this program alone; remove it")
    return descriptor


@contextmanager
def locked(
    path: Path, shown: Path, busy: Callable[[str], str], *, keeps_file: bool = False
) -> Iterator[None]:
    """Hold the lock of the file `path` while the context is open; the file is removed at the end.

    Raises OutputError, with what `busy` makes of the number of the process that holds it, if there
    is one; and about `shown` if the file cannot be made.
    """
    try:
        with output_errors(path if os.path.lexists(path) else shown):
            descriptor = hold(path, open_own)
    except Held as error:
        raise OutputError(busy(str(error))) from error
    try:
        yield
    finally:
        if not keeps_file:
            with suppress(OSError):  # a lock that nobody holds is in nobody's way
                path.unlink()
        os.close(descriptor)


def write_whole(path: Path, data: Bytes | str) -> None:
    """Write a small file whole or not at all; text as UTF-8."""
    with whole_file(path) as file:
        file.write(data.encode("utf-8") if isinstance(data, str) else data)


def copy_whole(source: Path, path: Path) -> None:
    """Copy a file of an untrusted folder whole or not at all; links as in `open_entry`."""
    read_errors = output_errors(source, "cannot be read")
    with whole_file(path) as file, read_errors, open_entry(source) as original:
        while block := original.read(_COPY_BYTES):
            file.write(block)


def link_or_copy(source: Path, path: Path) -> None:
    """Give a finished file a second name; a copy where the file system has no hard links.

    The copy has the same time of change. The caller must not write into either: files are replaced
    whole. Raises OutputError if neither is possible.
    """
    remove(path)
    try:
        os.link(source, path, follow_symlinks=False)
    except OSError:
        copy_whole(source, path)
        with output_errors(path):
            stat = source.stat()
            os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def rename(old: Path, new: Path) -> None:
    """Rename a file or folder, and flush the change to the disk."""
    with output_errors(new):
        if not old.is_dir():
            check_replaceable(new)
        os.replace(old, new)
        for folder in {old.parent, new.parent}:
            sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some file systems cannot do this
            raise
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Create a folder and its parents, where they are missing; OutputError if it is a link."""
    with output_errors(folder):
        if not folder.is_dir():
            missing = [place for place in (folder, *folder.parents) if not place.is_dir()]
            for place in reversed(missing):  # Path.mkdir would call itself for each
                place.mkdir(exist_ok=True)
            sync_folder(folder.parent)
    refuse_link(folder)


def check_replaceable(path: Path) -> None:
    """Raise OutputError if anything but a file or link lies at `path`: it would be destroyed.

    A link to a pipe, socket or device, such as /dev/stdout, is refused as well.
    """
    with output_errors(path):
        words = entry_kind(path)
        is_link = path.is_symlink()
    if words and not (is_link and words == "a folder"):
        link = "a link to " if is_link else ""
        raise OutputError(
            f"{path}: {link}{words}, which is not replaced, expected a file or a new name; pass "
            "another output"
        )


def entry_kind(path: Path) -> str:
    """What lies at a name, links followed, as `what_it_is` says; empty if there is nothing.

    Raises OSError for a name that no file can have.
    """
    try:
        return what_it_is(path)
    except FileNotFoundError:
        return ""
    except OSError as error:
        if error.errno == errno.ELOOP:  # a link in a circle is replaced as any other
            return ""
        raise


def refuse_link(path: Path) -> None:
    """Raise OutputError if a file or folder of this program is a link."""
    if path.is_symlink():
        raise OutputError(
            f"{path}: a link, which is not followed, expected a file or folder of reap2gguf's own; "
            "remove it, or pass another output"
        )


def remove(path: Path) -> None:
    """Remove a file, or a folder with its contents, if it exists."""
    with output_errors(path, "cannot be removed"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def reserve(descriptor: int, n_bytes: int) -> None:
    """Set a file's length and reserve its blocks. Raises OSError, such as for a full disk."""
    os.ftruncate(descriptor, n_bytes)
    if not hasattr(os, "posix_fallocate") or n_bytes == 0:
        return
    try:
        os.posix_fallocate(descriptor, 0, n_bytes)
    except OSError as error:
        # some file systems cannot reserve blocks; the length is set, and a write may fail later
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
