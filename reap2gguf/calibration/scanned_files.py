"""Files of texts and samples, each scanned once: checked, hashed, and its records counted.

A scan reads the file once. Afterwards a text is read a second time, and of a JSONL file the records
that were drawn, and nothing else. A file that changes after its scan is an error.
"""

from __future__ import annotations

import codecs
import hashlib
import json
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

from reap2gguf.calibration.layouts import columns, read_record
from reap2gguf.errors import CalibrationError
from reap2gguf.files import file_sha256, open_plain, plain_size

if TYPE_CHECKING:
    from reap2gguf.calibration.tool_calls import Message, Tool

_MAX_TEXT_BYTES = 2**28
_BLOCK_BYTES = 2**20
_MAX_LINE_BYTES = 2**22
# pyarrow raises errors of these classes, also for values that Python cannot hold
_PARQUET_ERRORS = (OSError, ValueError, TypeError, LookupError, ArithmeticError, RuntimeError)


class RenderChat(Protocol):
    """Applies a model's chat template."""

    def __call__(self, messages: list[Message], tools: list[Tool] | None = None, /) -> str: ...


def sample_text(record: Any, render_chat: RenderChat, where: str) -> str:
    """The text of the sample in a record, messages through the chat template.

    Raises CalibrationError if no layout fits the record, or the template refuses it.
    """
    sample = read_record(record, where)
    if sample.text is not None:
        text = sample.text
    else:
        tools = None if sample.tools is None else list(sample.tools)
        try:
            text = render_chat(list(sample.messages), tools)
        except CalibrationError as error:
            raise CalibrationError(f"{where}: {error}") from error
    if not text.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise CalibrationError(f"{where} holds half a character (a surrogate)")
    return text


class _ScannedFile:
    """A file as one scan found it. Raises CalibrationError if it cannot be used."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.stamp = _stamp(path)

    @contextmanager
    def opened(self) -> Iterator[BinaryIO]:
        """The file for reading; CalibrationError if it is not the one that was scanned."""
        with _read_errors(self.path), open_plain(self.path) as file:
            self.check_unchanged()
            yield file

    def check_unchanged(self) -> None:
        """Raise CalibrationError if the file has changed since the scan."""
        if _stamp(self.path) != self.stamp:
            raise CalibrationError(
                f"{self.path}: changed while it was read; run the same command again"
            )


def _stamp(path: Path) -> tuple[int, int, int, int]:
    """Device, inode, size and time of a plain file: a file that was changed has another stamp."""
    with _read_errors(path):
        plain_size(path)
        status = path.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


@contextmanager
def _read_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CalibrationError(f"{path}: cannot be read ({error.strerror or error})") from error


class TextFile(_ScannedFile):
    """A UTF-8 text. Memory while scanning: one block."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        size = self.stamp[2]
        if size > _MAX_TEXT_BYTES:
            raise CalibrationError(
                f"{path}: {size:,} bytes of text, expected at most {_MAX_TEXT_BYTES:,}; cut it to "
                "the part that you want to use"
            )
        decoder = codecs.getincrementaldecoder("utf-8")()
        digest, n_done = hashlib.sha256(), 0
        try:
            with self.opened() as file:
                while block := file.read(_BLOCK_BYTES):
                    digest.update(block)
                    decoder.decode(block)
                    n_done += len(block)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            raise CalibrationError(
                f"{path}: not UTF-8 text (about byte {n_done + error.start:,}); convert it with "
                "iconv"
            ) from error
        self.sha256 = digest.hexdigest()

    def text(self) -> str:
        """The whole text."""
        with self.opened() as file:
            return file.read().decode("utf-8")


class JsonlFile(_ScannedFile):
    """A file with one record per line; each is checked. Memory: one line, 8 bytes per record."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        digest, position = hashlib.sha256(), 0
        self._offsets = array("Q")  # where each record starts
        with self.opened() as file:
            for number, line in enumerate(self._lines(file), start=1):
                digest.update(line)
                if line.strip():
                    self._offsets.append(position)
                    record = self._parse(line, f"line {number}")
                    where = f"{path}: sample {len(self._offsets)}"
                    sample_text(record, lambda messages, tools=None: "", where)
                position += len(line)
        self.sha256 = digest.hexdigest()

    @property
    def n_records(self) -> int:
        return len(self._offsets)

    def records(self) -> Iterator[Any]:
        """All records, in order."""
        with self.opened() as file:
            for number, line in enumerate(self._lines(file), start=1):
                if line.strip():
                    yield self._parse(line, f"line {number}")

    def records_at(self, numbers: Sequence[int]) -> Iterator[Any]:
        """The records of these numbers, counted from 0, in this order."""
        with self.opened() as file:
            for number in numbers:
                file.seek(self._offsets[number])
                line = file.readline(_MAX_LINE_BYTES + 1)
                yield self._parse(line, f"sample {number + 1}")

    def _lines(self, file: BinaryIO) -> Iterator[bytes]:
        # one byte more than a line may have, never all of it: a file may be one endless line
        lines = iter(lambda: file.readline(_MAX_LINE_BYTES + 1), b"")
        for number, line in enumerate(lines, start=1):
            if len(line) > _MAX_LINE_BYTES:
                raise CalibrationError(
                    f"{self.path}: line {number} is over {_MAX_LINE_BYTES:,} bytes, too long for "
                    "one sample"
                )
            yield line

    def _parse(self, line: bytes, where: str) -> Any:
        try:
            return json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise CalibrationError(f"{self.path}: {where} is not JSON ({error})") from error


class ParquetFile(_ScannedFile):
    """A Parquet file. The scan reads the footer alone; memory afterwards: one row group.

    The footer's number of rows is not trusted, so that they are counted by reading them.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        with self._parquet():
            pass

    @cached_property
    def sha256(self) -> str:
        with _read_errors(self.path):
            self.check_unchanged()
            return file_sha256(self.path)

    @cached_property
    def n_records(self) -> int:
        return sum(batch.num_rows for batch in self._batches())

    def records(self) -> Iterator[Any]:
        """All records, in order."""
        for batch in self._batches():
            try:
                yield from batch.to_pylist()
            except _PARQUET_ERRORS as error:
                raise self._broken(error) from error

    def records_at(self, numbers: Sequence[int]) -> Iterator[Any]:
        """The records of these numbers, counted from 0 and ascending; reads the whole file."""
        wanted = set(numbers)
        return (record for number, record in enumerate(self.records()) if number in wanted)

    def _batches(self) -> Iterator[Any]:
        try:
            with self._parquet() as file:
                wanted = columns(list(file.schema_arrow.names))
                yield from file.iter_batches(batch_size=256, columns=wanted)
        except _PARQUET_ERRORS as error:
            raise self._broken(error) from error

    def _parquet(self) -> Any:
        import pyarrow.parquet

        self.check_unchanged()
        try:
            return pyarrow.parquet.ParquetFile(self.path)
        except _PARQUET_ERRORS as error:
            raise self._broken(error) from error

    def _broken(self, error: Exception) -> CalibrationError:
        return CalibrationError(f"{self.path}: cannot be read as Parquet ({error})")


SampleFile = JsonlFile | ParquetFile


class ScannedFiles:
    """Files by path, each scanned at its first use, and again if it has changed since."""

    def __init__(self) -> None:
        self._samples: dict[Path, SampleFile] = {}
        self._texts: dict[Path, TextFile] = {}

    def file(self, path: Path) -> TextFile | SampleFile:
        """A file of samples by its suffix, else a text. Raises CalibrationError."""
        if path.suffix not in (".jsonl", ".parquet"):
            return self.text(path)
        known = self._samples.get(path)
        if known is None or known.stamp != _stamp(path):
            known = JsonlFile(path) if path.suffix == ".jsonl" else ParquetFile(path)
            self._samples[path] = known
        return known

    def text(self, path: Path) -> TextFile:
        """A text, whatever its suffix. Raises CalibrationError."""
        known = self._texts.get(path)
        if known is None or known.stamp != _stamp(path):
            known = self._texts[path] = TextFile(path)
        return known
