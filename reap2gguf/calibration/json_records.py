"""Records of a JSON file: one per line, or the entries of one array; memory: one record.

The form is known by the first letter, whatever the file's suffix: `.json` files often hold lines,
and `.jsonl` files one array.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from reap2gguf.errors import CalibrationError

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
    yield from _lines(file, path, on_bytes, seen)


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
        if path.suffix != ".json":
            raise
        raise CalibrationError(
            f"{error}; a .json file holds one array of records, or one record per line"
        ) from error


class _Array:
    """Reads the entries of one JSON array. Memory: twice the largest entry."""

    def __init__(self, file: BinaryIO, path: Path, on_bytes: Callable[[bytes], object]) -> None:
        self._file, self._path, self._on_bytes = file, path, on_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._text, self._at = "", 0  # what was read and not used yet begins at _at
        self._position = 0  # of the byte at _at
        self._number, self._is_at_end = 0, False

    def entries(self) -> Iterator[tuple[Place, Any]]:
        self._more(_BLOCK_BYTES)
        self._next_letter()
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
        if self._next_letter():
            raise self._broken("text after the array; expected one array, or one object per line")

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
