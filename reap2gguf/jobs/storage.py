"""Save the output folder of a running build to a bucket or volume, and restore it elsewhere.

The build itself works on a local disk: it needs locks, renames and writes at any position, which a
mounted bucket does not have. What is asked of the storage is little: create a file, write it from
front to back, list, read, delete. No file there is ever changed or renamed.

STORAGE/objects/OBJECT               the bytes of one file
STORAGE/index/NUMBER-ID.json         the files of one saved state: names, sizes, times, hashes

An index is written after all of its objects and ends with its own hash, so a half-saved state is
never taken for a whole one: restoring takes the newest index whose hash and objects are right.
Times are kept to the nanosecond, since a build knows its finished files by size and time of change.

The caller stops the build while its files are copied. Then what is saved is what a kill at that
moment would leave, and every build resumes from that. Unfinished files (`*.part`) are left out: a
build that finds none writes them again. Memory: one piece of 16 MiB.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from reap2gguf.atomic import PART, make_folder, output_errors, remove, whole_file, write_whole
from reap2gguf.errors import OutputError
from reap2gguf.files import is_own_file, open_plain, read_entry
from reap2gguf.hub.retry import Note, ignore_note

QUIET_SECONDS = 2.0  # a file that changed less long ago may change again within one clock tick
_MARKER = ".storage.json"  # in the output: which saved state its files come from
_KEPT_INDEXES = 3
_PIECE_BYTES = 2**24
_MOST_INDEX_BYTES = 2**26
_MOST_FILES = 200_000
_MOST_BYTES = 2**50
_OBJECT = re.compile(r"[0-9a-f]{32}")
_INDEX = re.compile(r"(\d{8})-[0-9a-f]{8}\.json")
_NO_FSYNC = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)  # what a mount without fsync answers

Pause = Callable[[], AbstractContextManager[None]]
_Identity = tuple[int, int, int]  # inode, bytes, time of change: a renamed file keeps them


@dataclass(frozen=True)
class Entry:
    """One file of a saved state."""

    name: str  # below the output folder, with slashes
    object: str
    n_bytes: int
    changed_ns: int
    sha256: str


class Storage:
    """The saved states of one output folder. One machine at a time saves to a storage.

    The newest machine wins: it marks the storage when it restores, and an older one that is still
    running finds that out by `is_taken`.
    """

    def __init__(self, folder: Path, output: Path, note: Note = ignore_note) -> None:
        self.folder = folder
        self.output = output
        self._note = note
        self._last = ""  # the name of the newest index, as this machine knows it
        self._entries: tuple[Entry, ...] = ()
        self._known: dict[_Identity, Entry] = {}  # what has an object already

    # ------------------------------------------------------------------------------- restore

    def restore(self) -> int:
        """Bring the newest whole saved state into the output folder; how many files it has.

        An output that was saved last from this very folder is newer, and remains as it is. Raises
        OutputError if the output holds other files, or if either folder cannot be used.
        """
        with output_errors(self.folder):
            for folder in (self.folder, self._objects, self._indexes):
                folder.mkdir(parents=True, exist_ok=True)
        make_folder(self.output)
        names = self._index_names()
        self._last = names[-1] if names else ""
        if self._is_occupied(names, self._read_marker()):
            self._entries = self._read_index(self._last) or () if names else ()
            self._remember_unchanged()
        else:
            self._restore_newest(names)
        self._write_index(self._entries)  # from here on, this machine's
        self._drop_old()
        return len(self._entries)

    def _is_occupied(self, names: Sequence[str], marker: Mapping[str, Any]) -> bool:
        """Whether the output's own files are the ones to resume from."""
        if marker.get("restoring") is True:
            remove_contents(self.output)  # of a restore that was interrupted
            return False
        if not any(self._files()):
            return False
        if not names or names[-1] in marker.get("indexes", ()):
            return True
        raise OutputError(
            f"{self.output}: holds files that are not those saved last in {self.folder}; remove "
            "them, or pass another --output or --storage"
        )

    def _restore_newest(self, names: Sequence[str]) -> None:
        for name in reversed(names):
            entries = self._read_index(name)
            if entries is not None and self._restored(entries):
                self._entries = entries
                return
            self._note(f"{self.folder}: the saved state {name} is incomplete, and is not used")

    def _restored(self, entries: Sequence[Entry]) -> bool:
        """Whether all files were brought; if not, none of them is left."""
        write_whole(self.output / _MARKER, json.dumps({"restoring": True}))
        for entry in entries:
            if not self._restore_file(entry):
                remove_contents(self.output)
                return False
        return True

    def _restore_file(self, entry: Entry) -> bool:
        path = self.output / entry.name
        digest, left = hashlib.sha256(), entry.n_bytes
        make_folder(path.parent)
        try:
            source = open_plain(self._objects / entry.object)
        except OSError:
            return False  # the caller reports that the state is incomplete
        with source, whole_file(path) as file:
            for piece in _pieces(source, self._objects / entry.object):
                digest.update(piece)
                left -= len(piece)
                file.write(piece)
        if left or digest.hexdigest() != entry.sha256:
            return False
        with output_errors(path):
            os.utime(path, ns=(entry.changed_ns, entry.changed_ns))
            self._known[_identity(path.lstat())] = entry
        return True

    def _remember_unchanged(self) -> None:
        """What the last index says of files that lie here unchanged: they are not copied again."""
        for entry in self._entries:
            path = self.output / entry.name
            if is_own_file(path):
                stat = path.lstat()
                if (stat.st_size, stat.st_mtime_ns) == (entry.n_bytes, entry.changed_ns):
                    self._known[_identity(stat)] = entry

    # ---------------------------------------------------------------------------------- save

    def save(
        self,
        pause: Pause = nullcontext,
        *,
        settle: bool = True,
        keep: Callable[[str], bool] = lambda name: True,
    ) -> bool:
        """Save the files of the output whose names `keep` accepts; False if nothing has changed.

        Most bytes are copied while the build runs; the rest while `pause` keeps it stopped. With
        `settle`, it first waits until what was just written counts as quiet. Raises OutputError if
        the storage cannot be written; the states that it holds remain.
        """
        if settle:
            time.sleep(QUIET_SECONDS)
        for name in filter(keep, self._files()):
            self._copy_if_quiet(name)
        with pause():
            entries = tuple(self._entry(name) for name in filter(keep, self._files()))
        if [_public(entry) for entry in entries] == [_public(entry) for entry in self._entries]:
            return False
        self._write_index(entries)
        self._drop_old()
        return True

    def signature(self) -> int:
        """A number that changes when a file that would be saved does."""
        stats = [(name, self.output / name) for name in self._files()]
        return hash(tuple((name, _stamp(path)) for name, path in stats))

    def is_taken(self) -> bool:
        """Whether another machine has restored from this storage since; it must not be written."""
        return self._index_names()[-1:] != [self._last]

    def _copy_if_quiet(self, name: str) -> None:
        path = self.output / name
        try:
            before = path.lstat()
        except FileNotFoundError:
            return  # renamed or removed meanwhile
        if _identity(before) in self._known or not _is_quiet(before):
            return
        try:
            entry = self._copy(name, before)
        except FileNotFoundError:
            return  # renamed or removed meanwhile
        if is_own_file(path) and _identity(path.lstat()) == _identity(before):
            self._known[_identity(before)] = entry
        else:
            remove(self._objects / entry.object)

    def _entry(self, name: str) -> Entry:
        """A file's entry, with its bytes in the storage. Nothing writes to the file meanwhile."""
        stat = (self.output / name).lstat()
        known = self._known.get(_identity(stat))
        if known is not None:
            return Entry(name, known.object, known.n_bytes, known.changed_ns, known.sha256)
        entry = self._copy(name, stat)
        if _is_quiet(stat):
            self._known[_identity(stat)] = entry
        return entry

    def _copy(self, name: str, stat: os.stat_result) -> Entry:
        """Copy a file's bytes to a new object. Raises FileNotFoundError if the file is gone."""
        target = self._objects / secrets.token_hex(16)
        path, digest, n_bytes = self.output / name, hashlib.sha256(), 0
        with open_plain(path) as source, output_errors(target):
            with target.open("wb", buffering=0) as file:
                for piece in _pieces(source, path):
                    digest.update(piece)
                    n_bytes += len(piece)
                    _write(file, piece)
                _flush(file)
            if target.stat().st_size != n_bytes:
                raise OSError(errno.EIO, "the file there is shorter than what was written")
        return Entry(name, target.name, n_bytes, stat.st_mtime_ns, digest.hexdigest())

    # ------------------------------------------------------------------------------- indexes

    @property
    def _objects(self) -> Path:
        return self.folder / "objects"

    @property
    def _indexes(self) -> Path:
        return self.folder / "index"

    def _index_names(self) -> list[str]:
        """Names of the indexes, the newest last."""
        with output_errors(self.folder, "cannot be read"):
            return sorted(name for name in os.listdir(self._indexes) if _INDEX.fullmatch(name))

    def _write_index(self, entries: Sequence[Entry]) -> None:
        number = int(self._last[:8]) + 1 if self._last else 1
        name = f"{number:08d}-{secrets.token_hex(4)}.json"
        body = json.dumps({"format": 1, "files": [vars(entry) for entry in entries]})
        data = f"{body}\n{hashlib.sha256(body.encode()).hexdigest()}\n".encode()
        path = self._indexes / name
        # before the index: after a kill in between, this output still knows that it is its own
        write_whole(self.output / _MARKER, json.dumps({"indexes": [self._last, name]}))
        with output_errors(path), path.open("wb", buffering=0) as file:
            _write(file, data)
            _flush(file)
        self._last, self._entries = name, tuple(entries)

    def _read_index(self, name: str) -> tuple[Entry, ...] | None:
        """The entries of an index; None if it is damaged or an object of it is missing."""
        try:
            body, _, check = read_entry(self._indexes / name, _MOST_INDEX_BYTES).partition(b"\n")
            if check.strip().decode("ascii") != hashlib.sha256(body).hexdigest():
                return None
            values = json.loads(body)
            if values["format"] != 1 or len(values["files"]) > _MOST_FILES:
                return None
            entries = tuple(_checked(Entry(**entry)) for entry in values["files"])
            sizes = {entry.object: entry.n_bytes for entry in entries}
            if any((self._objects / one).stat().st_size != size for one, size in sizes.items()):
                return None
        except (OSError, OutputError, ValueError, TypeError, KeyError):
            return None
        return entries

    def _drop_old(self) -> None:
        """Remove what is no longer needed; a storage that cannot delete only grows."""
        try:
            self._drop_unused()
        except OutputError as error:
            self._note(str(error))

    def _drop_unused(self) -> None:
        """Remove old indexes, and the objects that no index which remains names."""
        names = self._index_names()
        kept = names[-_KEPT_INDEXES:]
        used = {entry.object for name in kept for entry in self._read_index(name) or ()}
        used.update(entry.object for entry in self._entries)
        for name in names[: -len(kept)]:
            remove(self._indexes / name)
        with output_errors(self.folder, "cannot be read"):
            unused = {name for name in os.listdir(self._objects) if _OBJECT.fullmatch(name)} - used
        for name in unused:
            remove(self._objects / name)
        self._known = {known: one for known, one in self._known.items() if one.object in used}

    # -------------------------------------------------------------------------------- output

    def _files(self) -> Iterator[str]:
        """Names of the files that belong to a saved state, in order."""
        for folder, folders, files in os.walk(self.output):
            folders[:] = sorted(name for name in folders if not name.endswith(".push"))
            for name in sorted(files):
                path = Path(folder) / name
                if name != _MARKER and not name.endswith((PART, ".lock")) and is_own_file(path):
                    yield path.relative_to(self.output).as_posix()

    def _read_marker(self) -> Mapping[str, Any]:
        try:
            values = json.loads(read_entry(self.output / _MARKER, 2**16))
        except (OSError, OutputError, ValueError):
            return {}  # an output that this storage has not marked as its own
        return values if isinstance(values, dict) else {}


def remove_contents(folder: Path) -> None:
    """Remove everything in a folder but the marker of a restore."""
    for path in folder.iterdir():
        if path.name != _MARKER:
            remove(path)


def _checked(entry: Entry) -> Entry:
    """An entry whose name stays below the output. Raises ValueError for any other."""
    parts = PurePosixPath(entry.name).parts
    is_inside = parts and not PurePosixPath(entry.name).is_absolute() and ".." not in parts
    if not is_inside or "\0" in entry.name or not _OBJECT.fullmatch(entry.object):
        raise ValueError(entry.name)
    for number in (entry.n_bytes, entry.changed_ns):
        if type(number) is not int or not 0 <= number <= 2**63:
            raise ValueError(entry.name)
    if entry.n_bytes > _MOST_BYTES:
        raise ValueError(entry.name)
    return entry


def _identity(stat: os.stat_result) -> _Identity:
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def _stamp(path: Path) -> tuple[int, ...]:
    try:
        return _identity(path.lstat())
    except FileNotFoundError:
        return ()


def _is_quiet(stat: os.stat_result) -> bool:
    return time.time_ns() - stat.st_mtime_ns > QUIET_SECONDS * 0.9e9


def _public(entry: Entry) -> tuple[str, int, int, str]:
    """What of an entry matters: the object may be another copy of the same bytes."""
    return entry.name, entry.n_bytes, entry.changed_ns, entry.sha256


def _pieces(source: BinaryIO, path: Path) -> Iterator[bytes]:
    with output_errors(path, "cannot be read"):
        while piece := source.read(_PIECE_BYTES):
            yield piece


def _write(file: Any, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def _flush(file: Any) -> None:
    try:
        os.fsync(file.fileno())
    except OSError as error:
        if error.errno not in _NO_FSYNC:
            raise
