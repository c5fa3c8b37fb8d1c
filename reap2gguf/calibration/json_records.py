"""Records of a JSON file: one per line, of one array, or one object; memory: one record.

An object that is the whole file is a record, or holds the list of the records.

The form is known by the first letter, whatever the file's suffix: `.json` files often hold lines,
and `.jsonl` files one array.
"""

from __future__ import annotations

import codecs
import json
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from reap2gguf.calibration.layouts import is_record
from reap2gguf.errors import CalibrationError
from reap2gguf.messages import shown

MAX_RECORD_BYTES = 2**22
_BLOCK_BYTES = 2**20
_SPACE = " \t\r\n"
_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"PK\x03\x04": "zip",
}
_WIDE = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)


@dataclass(frozen=True)
class Place:
    """Where the bytes of a record are."""

    offset: int
    length: int


def check_encoding(head: bytes, path: Path) -> None:
    """Raise CalibrationError if a file that begins with `head` is compressed, or not UTF-8."""
    for magic, name in _COMPRESSED.items():
        if head.startswith(magic):
            raise CalibrationError(f"{path}: compressed with {name}; decompress it first")
    if head.startswith(_WIDE):
        raise CalibrationError(
            f"{path}: UTF-16 text, expected UTF-8; convert it with "
            f"`iconv -f UTF-16 -t UTF-8 {path.name}`"
        )


def parse_record(raw: bytes, path: Path, where: str) -> Any:
    """The value of a JSON text. Raises CalibrationError if it is not one."""
    try:
        return json.loads(raw.decode("utf-8"))
    except RecursionError as error:
        raise CalibrationError(f"{path}: {where} is nested too deeply; flatten it") from error
    except ValueError as error:
        raise CalibrationError(f"{path}: {where} is not JSON ({error})") from error


def iterate_records(
    file: BinaryIO, path: Path, on_bytes: Callable[[bytes], object]
) -> Iterator[tuple[Place, Any]]:
    """The records of an open file, in order, and where each is; `on_bytes` gets all bytes.

    Raises CalibrationError for text that is not JSON, and for a record of over 4 MiB.
    """
    seen: list[bytes] = []
    while True:
        line = file.readline(MAX_RECORD_BYTES + 1)
        if not seen:
            check_encoding(line, path)
        text = line if seen else line.removeprefix(codecs.BOM_UTF8)
        seen.append(line)
        if not line or text.strip():
            break
    if text.lstrip().startswith(b"["):
        file.seek(0)
        yield from _Array(file, path, on_bytes).entries()
        return
    is_object = text.lstrip().startswith(b"{")
    if is_object and (names := _whole_object(file, path, text, seen)) is not None:
        yield from _object(file, path, on_bytes, names)
        return
    yield from _lines(file, path, on_bytes, seen)


def _whole_object(file: BinaryIO, path: Path, line: bytes, seen: list[bytes]) -> _Names | None:
    """The fields of the object that a file is; None for one record per line, and for no JSON.

    `line` is the first line with text, the last of those that were read. More may be put there.
    """
    try:
        is_one_line = isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        is_one_line = False  # an object for people, a line over the limit, or broken
    while is_one_line and (more := file.readline(MAX_RECORD_BYTES + 1)):
        seen.append(more)
        if more.strip():
            return None
    file.seek(0)
    reader = _Array(file, path, len)
    try:
        deque(reader.entries_of(None), maxlen=0)
        names = reader.names
        is_whole = not is_one_line or (bool(names.lists) and not is_record(names.all))
    except CalibrationError:
        is_whole = False  # the reader of lines says what is wrong
    if is_whole:
        return names
    file.seek(sum(map(len, seen)))
    return None


def _object(
    file: BinaryIO, path: Path, on_bytes: Callable[[bytes], object], names: _Names
) -> Iterator[tuple[Place, Any]]:
    """The records in the one object of a file: itself, or those of its only list of objects."""
    file.seek(0)
    if not is_record(names.all) and len(names.lists) == 1:
        yield from _Array(file, path, on_bytes).entries_of(names.lists[0])
        return
    found = ", ".join(shown(name) for name in names.all[:12]) or "nothing"
    if not is_record(names.all):
        raise CalibrationError(
            f"{path}: one object with {found}, expected a record, or one list of records "
            f"({len(names.lists)} found); save the records as JSONL, one per line"
        )
    raw = file.read(MAX_RECORD_BYTES + 1)
    if len(raw) > MAX_RECORD_BYTES:
        raise CalibrationError(
            f"{path}: one record with {found}, over {MAX_RECORD_BYTES:,} bytes, too long for one "
            "sample"
        )
    on_bytes(raw)
    mark = len(codecs.BOM_UTF8) if raw.startswith(codecs.BOM_UTF8) else 0
    yield Place(mark, len(raw) - mark), parse_record(raw[mark:], path, "the object")


def _lines(
    file: BinaryIO, path: Path, on_bytes: Callable[[bytes], object], first: list[bytes]
) -> Iterator[tuple[Place, Any]]:
    """One record per line; the lines of `first` are read already."""
    position, number = 0, 0
    while line := first.pop(0) if first else file.readline(MAX_RECORD_BYTES + 1):
        number += 1
        # one byte more than a line may have, never all of it: a file may be one endless line
        if len(line) > MAX_RECORD_BYTES:
            raise CalibrationError(
                f"{path}: line {number} is over {MAX_RECORD_BYTES:,} bytes, too long for one sample"
            )
        on_bytes(line)
        mark = len(codecs.BOM_UTF8) if not position and line.startswith(codecs.BOM_UTF8) else 0
        if line[mark:].strip():
            yield Place(position + mark, len(line) - mark), _line(line[mark:], path, number)
        position += len(line)


def _line(line: bytes, path: Path, number: int) -> Any:
    try:
        return parse_record(line, path, f"line {number}")
    except CalibrationError as error:
        if path.suffix.lower() != ".json":
            raise
        raise CalibrationError(
            f"{error}; a .json file holds one array of records, or one record per line"
        ) from error


@dataclass(frozen=True)
class _Names:
    """The fields of an object, and which of them are lists of objects."""

    all: list[str] = field(default_factory=list)
    lists: list[str] = field(default_factory=list)


class _Array:
    """Reads the entries of one JSON array, alone or in an object. Memory: twice the largest."""

    def __init__(self, file: BinaryIO, path: Path, on_bytes: Callable[[bytes], object]) -> None:
        self._file, self._path, self._on_bytes = file, path, on_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._text, self._at = "", 0  # what was read and not used yet begins at _at
        self._position = 0  # of the byte at _at
        self._number, self._is_at_end = 0, False
        self.names = _Names()  # of an object, as far as it was read

    def entries(self) -> Iterator[tuple[Place, Any]]:
        self._more(_BLOCK_BYTES)
        self._next_letter()
        yield from self._list()
        if self._next_letter():
            raise self._broken("text after the array; expected one array, or one object per line")

    def entries_of(self, wanted: str | None) -> Iterator[tuple[Place, Any]]:
        """The entries of the list of that name in the object that is the file."""
        self._more(_BLOCK_BYTES)
        self._next_letter()
        self._advance(self._at + 1)  # the brace
        while self._next_letter() != "}":
            name, end = self._value()
            self._advance(end)
            if not isinstance(name, str) or self._next_letter() != ":":
                raise self._broken("expected a name and a colon")
            self._advance(self._at + 1)
            self.names.all.append(name)
            if self._next_letter() == "[":
                self._number, n_objects = 0, 0
                for place, value in self._list():
                    n_objects += isinstance(value, dict)
                    if name == wanted:
                        yield place, value
                if 0 < n_objects == self._number:
                    self.names.lists.append(name)
            else:
                self._advance(self._value()[1])
            if self._next_letter() == ",":
                self._advance(self._at + 1)
                if self._next_letter() == "}":
                    raise self._broken("expected another name after the comma")
            elif self._next_letter() != "}":
                raise self._broken("expected a comma or the end of the object")
        self._advance(self._at + 1)
        if self._next_letter():
            raise self._broken("text after the object")

    def _list(self) -> Iterator[tuple[Place, Any]]:
        self._advance(self._at + 1)  # the bracket
        while self._next_letter() != "]":
            self._number += 1
            value, end = self._value()
            start = self._position
            self._advance(end)
            yield Place(start, self._position - start), value
            if self._next_letter() not in (",", "]"):
                raise self._broken("expected a comma or the end of the array after it")
            if self._next_letter() == ",":
                self._advance(self._at + 1)
                if self._next_letter() in ("]", ""):
                    raise self._broken("expected another record after the comma")
        self._advance(self._at + 1)

    def _next_letter(self) -> str:
        """The next letter that is not a space; an empty text at the end of the file."""
        while True:
            rest = self._text[self._at : self._at + 1]
            if rest and rest not in _SPACE:
                return rest
            if rest:
                end = self._at
                while end < len(self._text) and self._text[end] in _SPACE:
                    end += 1
                self._advance(end)
            elif not self._more(_BLOCK_BYTES):
                return ""

    def _value(self) -> tuple[Any, int]:
        """The value that begins here, and its end in the text."""
        while True:
            reason = "it does not end"
            try:
                value, end = json.JSONDecoder().raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                reason = error.msg
            except RecursionError as error:
                raise self._broken("nested too deeply; flatten it") from error
            except ValueError as error:
                raise self._broken(str(error)) from error
            else:
                if end < len(self._text):
                    return value, end
                n_letters = end - self._at
                if not self._more(_BLOCK_BYTES):  # at the end of a block, a number may go on
                    return value, n_letters
                continue
            n_letters = len(self._text) - self._at
            if n_letters > MAX_RECORD_BYTES:
                raise self._broken(f"{reason}, or over {MAX_RECORD_BYTES:,} bytes long")
            if not self._more(max(_BLOCK_BYTES, n_letters)):
                raise self._broken(reason)

    def _advance(self, end: int) -> None:
        self._position += len(self._text[self._at : end].encode("utf-8"))
        self._at = end

    def _more(self, n_bytes: int) -> bool:
        """Read on; False at the end of the file."""
        block = self._file.read(n_bytes)
        self._on_bytes(block)
        is_first = not self._text
        try:
            self._text = self._text[self._at :] + self._decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            raise self._broken(f"not UTF-8 ({error.reason})") from error
        if is_first and block.startswith(codecs.BOM_UTF8):
            self._position = len(codecs.BOM_UTF8)
        self._at = 0
        self._is_at_end = not block
        return bool(block)

    def _broken(self, reason: str) -> CalibrationError:
        where = f"sample {self._number}" if self._number else "the array"
        return CalibrationError(f"{self._path}: {where} is not JSON ({reason})")
