"""Reading untrusted files; `atomic.py` is the writing side.

A path is checked before it is opened: reading a pipe or a device could block or never end, and a
link could lead out of the folder.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

Advance = Callable[[float], None]
_BLOCK_BYTES = 2**22
_HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
# a file in the folder of blobs that several repositories of the Hub's cache share
_SHARED_MARK = ".huggingface-shared-blobs"
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
    """A plain file, opened for reading. Raises OSError, also for anything that is not one."""
    file = open(path, "rb", opener=_without_blocking)  # noqa: SIM115
    if words := _kind(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(f"{words}, expected a file")
    return file


def _without_blocking(path: str, flags: int) -> int:
    # a pipe would block here until it has a writer
    return os.open(path, flags | os.O_NONBLOCK)


def is_plain(path: Path) -> bool:
    """Whether there is a plain file at `path`; False for names that no file can have."""
    # os.path answers False where Path raises: names too long, NUL bytes
    return os.path.isfile(path)


def is_plain_name(name: str) -> bool:
    """Whether an untrusted name is that of an entry in a folder: no path, no NUL."""
    return name not in ("", ".", "..") and "/" not in name and "\\" not in name and "\0" not in name


def leads_out(path: Path, folder: Path) -> bool:
    """Whether `path`, an entry of `folder`, is a link that leads out of the folder.

    The Hub's cache keeps files beside its snapshots: `models--x/snapshots/REVISION/file` leads to
    `models--x/blobs/HASH`, which is allowed. That may lead to `blobs/xx/HASH` beside `models--x`,
    which is allowed too: huggingface_hub keeps there what several repositories share.
    """
    if not path.is_symlink():
        return False
    home = Path(os.path.realpath(folder))
    allowed = [home]
    if home.parent.name == "snapshots":
        repository = home.parent.parent
        allowed.append(repository / "blobs")
        if (repository.parent / "blobs" / _SHARED_MARK).is_file():
            allowed.append(repository.parent / "blobs")
    target = Path(os.path.realpath(path))  # Path.resolve raises for links in a circle
    return not any(target.is_relative_to(place) for place in allowed)


def is_own_file(path: Path) -> bool:
    """Whether a plain file lies in its folder itself, and not behind a link.

    In the Hub's cache, every file of a snapshot is a link to its blob, which is allowed.
    """
    # os.path answers False where Path raises
    if os.path.islink(path) and (cached_blob(path) is None or leads_out(path, path.parent)):
        return False
    return is_plain(path)


def file_sha256(path: Path, advance: Advance | None = None) -> str:
    """SHA-256 of a plain file's bytes, in hexadecimal. Raises OSError.

    `advance` gets the size of each block that was read; an error that it raises ends the reading.
    """
    plain_size(path)
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
            if advance is not None:
                advance(len(block))
    return digest.hexdigest()


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
