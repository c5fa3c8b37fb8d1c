"""Reading untrusted files; `atomic.py` is the writing side.

Reading a pipe or a device could block or never end, and a link could lead to any file of this
machine. So a file is opened without waiting, and what was opened is looked at before it is read. A
path that the user named may be a link (`open_plain`); a file in a folder may not (`open_entry`),
except in a snapshot of the Hub's cache, whose files are links to the cache's own blobs.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import re
import stat
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

Advance = Callable[[float], None]
_BLOCK_BYTES = 2**22
_AHEAD_BYTES = 2**25  # that the disk reads while a block is hashed
# Linux reads no more than the disk's own readahead for one advice and forgets the rest; 128 KiB is
# its default
_ADVICE_BYTES = 2**17
# of `struct statfs` (statfs(2)), which begins with the kind of the file system; with room to spare
_STATFS_BYTES, _TMPFS = 512, 0x01021994
_GGUF = b"GGUF"  # how a GGUF file begins
_HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
# a file in the folder of blobs that several repositories of the Hub's cache share
_SHARED_MARK = ".huggingface-shared-blobs"
LINK_ADVICE = (
    "a link, which is not followed, since its target would be read and published with the model; "
    "replace it with a copy or a hard link"
)
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def what_it_is(path: Path) -> str:
    """What is at `path` if it is not a plain file: "a folder", "a pipe"; empty for a plain file.

    Links are followed. Raises OSError if there is nothing.
    """
    try:
        return _kind(path.stat().st_mode)
    except ValueError as error:  # a name with a NUL byte or half a character
        raise OSError(f"not the name of a file ({error})") from error


def _kind(mode: int) -> str:
    return next((words for test, words in _KINDS if test(mode)), "")


def plain_size(path: Path) -> int:
    """The size of a plain file in bytes.

    Raises OSError if there is none, or if it is a folder, a pipe or a device: opening a pipe would
    block until someone writes to it.
    """
    if words := what_it_is(path):
        raise OSError(f"{words}, expected a file")
    return path.stat().st_size


def open_plain(path: Path) -> BinaryIO:
    """A plain file, opened for reading; links are followed, so only for a path the user named.

    Raises OSError, also for anything that is not a plain file.
    """
    return _opened(path, 0)


def open_entry(path: Path, follow_links: bool = False) -> BinaryIO:
    """A plain file of an untrusted folder, opened for reading.

    A link is followed with `follow_links`, or from a snapshot of the Hub's cache to its blobs.
    Raises OSError for every other link, and for anything that is not a plain file.
    """
    if follow_links:
        return open_plain(path)
    if not path.is_symlink():
        return _opened(path, os.O_NOFOLLOW)
    if leads_away(path):
        raise OSError(errno.ELOOP, LINK_ADVICE, str(path))
    # what was checked is what is opened
    return _opened(Path(os.path.realpath(path)), os.O_NOFOLLOW)


class TooLargeError(OSError):
    """A file has more bytes than any file of its kind."""


def read_entry(path: Path, max_bytes: int) -> bytes:
    """All bytes of a small file of an untrusted folder, opened as `open_entry` does.

    Raises TooLargeError if it has more than `max_bytes`, OSError if it cannot be read.
    """
    with open_entry(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > max_bytes:
            raise TooLargeError(f"{size:,} bytes, expected at most {max_bytes:,}")
        return file.read(max_bytes)


def _opened(path: Path, more_flags: int) -> BinaryIO:
    def opener(name: str, flags: int) -> int:
        # a pipe would block here until it has a writer
        return os.open(name, flags | os.O_NONBLOCK | more_flags)

    file = open(path, "rb", opener=opener)  # noqa: SIM115
    if words := _kind(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(f"{words}, expected a file")
    return file


def is_gguf(path: Path) -> bool:
    """Whether a path is that of a GGUF file, by its name or its first bytes."""
    if path.suffix.lower() == ".gguf":
        return True
    try:
        with open_plain(path) as file:
            return file.read(len(_GGUF)) == _GGUF
    except OSError:
        return False  # a pipe, or a file that nobody may read


def is_plain(path: Path) -> bool:
    """Whether there is a plain file at `path`; False for names that no file can have."""
    # os.path answers False where Path raises: names too long, NUL bytes
    return os.path.isfile(path)


def is_own_file(path: Path) -> bool:
    """Whether a plain file lies in its folder itself, and not behind a link.

    In the Hub's cache, every file of a snapshot is a link to its blob, which is allowed.
    """
    return not leads_away(path) and is_plain(path)


def is_plain_name(name: str) -> bool:
    """Whether an untrusted name is that of an entry in a folder: no path, no NUL."""
    return name not in ("", ".", "..") and "/" not in name and "\\" not in name and "\0" not in name


def leads_away(path: Path) -> bool:
    """Whether `path` is a link that is not followed.

    The Hub's cache keeps files beside its snapshots: `models--x/snapshots/REVISION/file` leads to
    `models--x/blobs/HASH`, which is followed. That may lead to `blobs/xx/HASH` beside `models--x`,
    which is followed too: huggingface_hub keeps there what several repositories share.
    """
    if not os.path.islink(path):  # Path raises for a name that is too long
        return False
    target = Path(os.path.realpath(path))  # Path.resolve raises for links in a circle
    return not any(target.is_relative_to(place) for place in _blob_folders(path.parent))


def _blob_folders(folder: Path) -> list[Path]:
    """Where links in a folder may lead: the blobs of the Hub's cache if it is of a snapshot."""
    home = Path(os.path.realpath(folder))
    # the folder of a snapshot, or one for templates inside it
    snapshot = next((f for f in (home, home.parent) if f.parent.name == "snapshots"), None)
    if snapshot is None:
        return []
    repository = snapshot.parent.parent
    allowed = [repository / "blobs"]
    if (repository.parent / "blobs" / _SHARED_MARK).is_file():
        allowed.append(repository.parent / "blobs")
    return allowed


def file_sha256(path: Path, advance: Advance | None = None, *, follow_links: bool = True) -> str:
    """SHA-256 of a plain file's bytes, in hexadecimal. Raises OSError.

    `advance` gets the size of each block that was read; an error that it raises ends the reading.
    Without `follow_links`, links are followed as in `open_entry`.
    """
    digest = hashlib.sha256()
    with open_entry(path, follow_links) as file:
        size = os.fstat(file.fileno()).st_size
        view = memoryview(bytearray(max(1, min(size, _BLOCK_BYTES))))
        done = 0
        expect_range(file.fileno(), 0, min(size, _AHEAD_BYTES))
        while True:
            expect_range(file.fileno(), done + _AHEAD_BYTES, _BLOCK_BYTES)
            # not file.readinto, which copies through a buffer of its own
            count = os.preadv(file.fileno(), [view], done)
            if count == 0:
                return digest.hexdigest()
            digest.update(view[:count])
            done += count
            if advance is not None:
                advance(count)


def expect_range(descriptor: int, first: int, n_bytes: int) -> None:
    """Ask the system to read a range of a file that is needed soon; returns at once."""
    if not hasattr(os, "posix_fadvise"):  # macOS does not have it
        return
    with suppress(OSError):  # advice that a file system does not take costs nothing but speed
        if n_bytes < 1 or _is_in_memory(descriptor, first, first + n_bytes):
            return
        for begin in range(first, first + n_bytes, _ADVICE_BYTES):
            count = min(_ADVICE_BYTES, first + n_bytes - begin)
            os.posix_fadvise(descriptor, begin, count, os.POSIX_FADV_WILLNEED)


def _is_in_memory(descriptor: int, first: int, last: int) -> bool:
    """Whether both ends of a range are in memory: then hundreds of calls need not be made.

    Each call gives up the interpreter's lock, which other threads may keep for long.
    """
    if _peek is None or not hasattr(os, "RWF_NOWAIT"):  # Linux alone has both
        return False
    try:
        return all(_peek(descriptor, [bytearray(1)], at, os.RWF_NOWAIT) for at in (first, last - 1))
    except BlockingIOError:
        return False
    except OSError:  # a file system that cannot say, as tmpfs, where all is in memory
        return _is_tmpfs(descriptor, os.fstat(descriptor).st_dev)


_peek: Callable[..., int] | None = getattr(os, "preadv", None)  # at a byte, which is not used
_tmpfs_by_device: dict[int, bool] = {}


def _is_tmpfs(descriptor: int, device: int) -> bool:
    if device not in _tmpfs_by_device:
        found = ctypes.create_string_buffer(_STATFS_BYTES)
        failed = ctypes.CDLL(None).fstatfs(descriptor, found)
        kind = int.from_bytes(found.raw[: ctypes.sizeof(ctypes.c_long)], sys.byteorder)
        _tmpfs_by_device[device] = not failed and kind == _TMPFS
    return _tmpfs_by_device[device]


def cached_blob(path: Path) -> str | None:
    """The hash in a file's name in the Hub's cache; None for a file that is not in a cache.

    `models--x/snapshots/COMMIT/file` leads to `models--x/blobs/HASH`: SHA-256 of a large file, and
    git's hash of a small one.
    """
    if not path.is_symlink():
        return None
    target = Path(os.path.normpath(path.parent / os.readlink(path)))
    is_cache = target.parent == path.parent.parent.parent / "blobs"
    return target.name if is_cache and _HASH.fullmatch(target.name) else None
