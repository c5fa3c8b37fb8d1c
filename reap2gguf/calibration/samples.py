"""Samples in JSONL and Parquet, their texts and conversations as one text each."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from reap2gguf.calibration.layouts import columns, read_record
from reap2gguf.calibration.tool_calls import Message, Tool
from reap2gguf.errors import CalibrationError
from reap2gguf.files import plain_size

_MAX_LINE_BYTES = 2**22
# pyarrow's errors are of these kinds, and so are those of values that Python cannot hold
_PARQUET_ERRORS = (OSError, ValueError, TypeError, LookupError, ArithmeticError, RuntimeError)


class RenderChat(Protocol):
    """Applies a model's chat template."""

    def __call__(self, messages: list[Message], tools: list[Tool] | None = None, /) -> str: ...


def read_samples(path: Path, render_chat: RenderChat) -> Iterator[str]:
    """The text of every sample in a .jsonl or .parquet file. Raises CalibrationError."""
    for number, record in enumerate(read_records(path), start=1):
        yield sample_text(record, render_chat, f"{path}: sample {number}")


def read_records(path: Path) -> Iterator[Any]:
    """The records of a .jsonl or .parquet file. Raises CalibrationError."""
    return _jsonl(path) if path.suffix == ".jsonl" else _parquet(path)


def count_records(path: Path) -> int:
    """How many records a file has, found by reading it. Raises CalibrationError."""
    if path.suffix == ".jsonl":
        return sum(1 for _ in _jsonl(path))
    return sum(batch.num_rows for batch in _batches(path))


def sample_text(record: Any, render_chat: RenderChat, where: str) -> str:
    """The text of one record, its messages through the chat template. Raises CalibrationError."""
    text = _render(record, render_chat, where)
    if not text.isprintable() and _has_surrogates(text):
        raise CalibrationError(f"{where} holds half a character (a surrogate)")
    return text


def _has_surrogates(text: str) -> bool:
    return any("\ud800" <= letter <= "\udfff" for letter in text)


def _jsonl(path: Path) -> Iterator[Any]:
    try:
        plain_size(path)
        with path.open("rb") as file:
            # never more than a line too long: a file may be one line of any length
            lines = iter(lambda: file.readline(_MAX_LINE_BYTES + 1), b"")
            for number, line in enumerate(lines, start=1):
                if len(line) > _MAX_LINE_BYTES:
                    raise CalibrationError(
                        f"{path}: line {number} is over {_MAX_LINE_BYTES:,} bytes, too long for "
                        "one sample"
                    )
                if line.strip():
                    try:
                        yield json.loads(line.decode("utf-8"))
                    except (ValueError, RecursionError) as error:
                        raise CalibrationError(
                            f"{path}: line {number} is not JSON ({error})"
                        ) from error
    except OSError as error:
        raise CalibrationError(f"{path}: cannot be read ({error.strerror or error})") from error


def _parquet(path: Path) -> Iterator[Any]:
    for batch in _batches(path):
        try:
            yield from batch.to_pylist()
        except _PARQUET_ERRORS as error:
            raise _no_parquet(path, error) from error


def _batches(path: Path) -> Iterator[Any]:
    file = open_parquet(path)
    try:
        wanted = columns(list(file.schema_arrow.names))
        yield from file.iter_batches(batch_size=256, columns=wanted)
    except _PARQUET_ERRORS as error:
        raise _no_parquet(path, error) from error


def open_parquet(path: Path) -> Any:
    """The file, its footer read."""
    import pyarrow.parquet

    try:
        plain_size(path)
        return pyarrow.parquet.ParquetFile(path)
    except _PARQUET_ERRORS as error:
        raise _no_parquet(path, error) from error


def _no_parquet(path: Path, error: Exception) -> CalibrationError:
    return CalibrationError(f"{path}: cannot be read as Parquet ({error})")


def _render(record: Any, render_chat: RenderChat, where: str) -> str:
    """The text of one sample."""
    sample = read_record(record, where)
    if sample.text is not None:
        return sample.text
    tools = None if sample.tools is None else list(sample.tools)
    try:
        return render_chat(list(sample.messages), tools)
    except CalibrationError as error:
        raise CalibrationError(f"{where}: {error}") from error
