"""Looks at files before they are opened: what is no plain file could wait for ever or never end."""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

Advance = Callable[[float], None]
_PIECE_BYTES = 2**22
_HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_SHARED_MARK = ".huggingface-shared-blobs"  # in the folder of what repositories of a cache share
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def what_it_is(path: Path) -> str:
    """What lies at `path` if it is no plain file: "a folder", "a pipe"; empty for a plain file.

    Raises OSError if nothing does. A link is what it leads to.
    """
    try:
        return _kind(path.stat().st_mode)
    except ValueError as error:  # a name with a NUL byte or half a character
        raise OSError(f"no name of a file ({error})") from error


def _kind(mode: int) -> str:
    return next((words for test, words in _KINDS if test(mode)), "")


def plain_size(path: Path) -> int:
    """Bytes of a plain file.

    Raises OSError if there is none, or if what is there is a folder, a pipe or a device: opening a
    pipe would wait until someone writes to it.
    """
    if words := what_it_is(path):
        raise OSError(f"{words}, expected a file")
    return path.stat().st_size


def open_plain(path: Path) -> BinaryIO:
    """A plain file, opened for reading. Raises OSError, also for what is none."""
    file = open(path, "rb", opener=_without_waiting)  # noqa: SIM115
    if words := _kind(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(f"{words}, expected a file")
    return file


def _without_waiting(path: str, flags: int) -> int:
    # a pipe would wait here for its writer
    return os.open(path, flags | os.O_NONBLOCK)


def is_plain(path: Path) -> bool:
    """Whether a plain file lies at `path`; False too for names that no file can have."""
    # os.path answers False where Path raises: names too long, NUL bytes
    return os.path.isfile(path)


def is_plain_name(name: str) -> bool:
    """Whether a name from a file is that of an entry of a folder: no path, no NUL."""
    return name not in ("", ".", "..") and "/" not in name and "\\" not in name and "\0" not in name


def leads_out(path: Path, folder: Path) -> bool:
    """Whether `path`, an entry of `folder`, is a link to a file elsewhere.

    The Hub's cache keeps its files beside its snapshots: `models--x/snapshots/REVISION/file` leads
    to `models--x/blobs/HASH`, which is not elsewhere. Nor is `blobs/xx/HASH` beside `models--x`, to
    which that may lead in turn: huggingface_hub keeps there what several repositories share.
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
    target = Path(os.path.realpath(path))  # Path.resolve raises where links go round
    return not any(target.is_relative_to(place) for place in allowed)


def file_sha256(path: Path, advance: Advance | None = None) -> str:
    """SHA-256 of a plain file's bytes, in hexadecimal. Raises OSError.

    `advance` is told of each piece that was read; what it raises ends the reading.
    """
    plain_size(path)
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_PIECE_BYTES):
            digest.update(piece)
            if advance is not None:
                advance(len(piece))
    return digest.hexdigest()


def cached_blob(path: Path) -> str | None:
    """The hash of a file by which the Hub's cache names it; None for what lies elsewhere.

    `models--x/snapshots/COMMIT/file` leads to `models--x/blobs/HASH`: SHA-256 of a large file, and
    git's hash of a small one.
    """
    if not path.is_symlink():
        return None
    target = Path(os.path.normpath(path.parent / os.readlink(path)))
    is_cache = target.parent == path.parent.parent.parent / "blobs"
    return target.name if is_cache and _HASH.fullmatch(target.name) else None
