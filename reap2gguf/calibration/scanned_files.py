"""Files of texts and samples, each scanned once: checked, hashed, and its records counted.

A scan reads the file once. Afterwards a text is read a second time, and of a JSON file the records
that were drawn, and nothing else. A file that changes after its scan is an error.
"""

from __future__ import annotations

import codecs
import hashlib
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

from reap2gguf.calibration.json_records import check_encoding, iterate_records, parse_record
from reap2gguf.calibration.layouts import columns, read_record
from reap2gguf.calibration.samples import Skipped
from reap2gguf.errors import BadSampleError, CalibrationError
from reap2gguf.files import file_sha256, open_plain, plain_size

_MAX_TEXT_BYTES = 2**28
_BLOCK_BYTES = 2**20
# pyarrow raises errors of these classes, also for values that Python cannot hold
_PARQUET_ERRORS = (OSError, ValueError, TypeError, LookupError, ArithmeticError, RuntimeError)


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
                    if not n_done:
                        check_encoding(block, path)
                    digest.update(block)
                    decoder.decode(block)
                    if (at := block.find(b"\0")) >= 0:
                        raise CalibrationError(
                            f"{path}: holds a NUL character (byte {n_done + at:,}); it is not "
                            "UTF-8 text, but perhaps UTF-16 or no text at all"
                        )
                    n_done += len(block)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            raise CalibrationError(
                f"{path}: not UTF-8 text (about byte {n_done + error.start:,}); convert it with "
                "iconv"
            ) from error
        self.sha256 = digest.hexdigest()

    def text(self) -> str:
        """The whole text, without a byte order mark."""
        with self.opened() as file:
            return file.read().decode("utf-8-sig")


class JsonFile(_ScannedFile):
    """A file with one record per line, or one array of them; each record is checked.

    Memory: one record, and 16 bytes for each.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        digest = hashlib.sha256()
        self._offsets, self._lengths = array("Q"), array("Q")
        skipped = Skipped()
        with self.opened() as file:
            for place, record in iterate_records(file, path, digest.update):
                self._offsets.append(place.offset)
                self._lengths.append(place.length)
                skipped.n_read += 1
                try:
                    read_record(record, f"{path}: sample {skipped.n_read}")
                except BadSampleError as error:
                    skipped.add_bad(error)
        skipped.check()
        self.sha256 = digest.hexdigest()

    @property
    def n_records(self) -> int:
        return len(self._offsets)

    def records(self) -> Iterator[Any]:
        """All records, in order."""
        with self.opened() as file:
            for _, record in iterate_records(file, self.path, len):
                yield record

    def records_at(self, numbers: Sequence[int]) -> Iterator[Any]:
        """The records of these numbers, counted from 0, in this order."""
        with self.opened() as file:
            for number in numbers:
                file.seek(self._offsets[number])
                raw = file.read(self._lengths[number])
                yield parse_record(raw, self.path, f"sample {number + 1}")


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


SampleFile = JsonFile | ParquetFile


class ScannedFiles:
    """Files by path, each scanned at its first use, and again if it has changed since."""

    def __init__(self) -> None:
        self._samples: dict[Path, SampleFile] = {}
        self._texts: dict[Path, TextFile] = {}

    @property
    def paths(self) -> list[Path]:
        """Every file that was scanned."""
        return [*self._samples, *self._texts]

    def file(self, path: Path) -> TextFile | SampleFile:
        """A file of samples by its suffix, else a text. Raises CalibrationError."""
        suffix = path.suffix.lower()
        if suffix not in (".json", ".jsonl", ".ndjson", ".parquet"):
            return self.text(path)
        known = self._samples.get(path)
        if known is None or known.stamp != _stamp(path):
            known = ParquetFile(path) if suffix == ".parquet" else JsonFile(path)
            self._samples[path] = known
        return known

    def text(self, path: Path) -> TextFile:
        """A text, whatever its suffix. Raises CalibrationError."""
        known = self._texts.get(path)
        if known is None or known.stamp != _stamp(path):
            known = self._texts[path] = TextFile(path)
        return known
