"""Samples in JSONL and Parquet: a text, messages, or a prompt and its completion."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from reap2gguf.errors import CalibrationError
from reap2gguf.files import plain_size

_MAX_LINE_BYTES = 2**22

Message = Mapping[str, Any]
Tool = Mapping[str, Any]


class RenderChat(Protocol):
    """Applies a model's chat template."""

    def __call__(self, messages: list[Message], tools: list[Tool] | None = None, /) -> str: ...


def read_samples(path: Path, render_chat: RenderChat) -> Iterator[str]:
    """The text of every sample in a .jsonl or .parquet file. Raises CalibrationError."""
    records = _jsonl(path) if path.suffix == ".jsonl" else _parquet(path)
    for number, record in enumerate(records, start=1):
        text = _render(record, render_chat, f"{path}: sample {number}")
        if not text.isprintable() and _has_surrogates(text):
            raise CalibrationError(f"{path}: sample {number} holds half a character (a surrogate)")
        yield text


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
    file = open_parquet(path)
    try:
        for batch in file.iter_batches(batch_size=256):
            yield from batch.to_pylist()
    # pyarrow's errors are of these kinds, and so are those of values that Python cannot hold
    except (OSError, ValueError, TypeError, LookupError, ArithmeticError, RuntimeError) as error:
        raise _no_parquet(path, error) from error


def open_parquet(path: Path) -> Any:
    """The file, its footer read."""
    import pyarrow.parquet

    try:
        plain_size(path)
        return pyarrow.parquet.ParquetFile(path)
    except (OSError, ValueError, TypeError, LookupError, ArithmeticError, RuntimeError) as error:
        raise _no_parquet(path, error) from error


def _no_parquet(path: Path, error: Exception) -> CalibrationError:
    return CalibrationError(f"{path}: cannot be read as Parquet ({error})")


def _render(record: Any, render_chat: RenderChat, where: str) -> str:
    """The text of one sample: `text`, `messages`, or `prompt` and `completion`."""
    if not isinstance(record, dict):
        raise CalibrationError(f"{where}: a {type(record).__name__}, expected an object")
    if isinstance(record.get("text"), str):
        return str(record["text"])
    messages = None
    if record.get("messages") is not None:
        messages = _messages(record["messages"], "user", where)
    elif record.get("prompt") is not None and record.get("completion") is not None:
        prompt = _messages(record["prompt"], "user", where)
        messages = prompt + _messages(record["completion"], "assistant", where)
    if messages is not None:
        tools = _tools(record.get("tools"), where)
        try:
            return render_chat(messages, tools)
        except CalibrationError as error:
            raise CalibrationError(f"{where}: {error}") from error
    names = ", ".join(str(name)[:80] for name in list(record)[:8]) or "no fields"
    raise CalibrationError(
        f"{where}: has {names}, expected text, messages, or prompt and completion"
    )


def _messages(value: Any, role: str, where: str) -> list[Message]:
    """Messages as given, or one of `role` where a plain string stands for it."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    good = isinstance(value, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and "content" in m for m in value
    )
    if not good or not value:
        raise CalibrationError(f"{where}: expected messages with a role and content each")
    return list(value)


def _tools(value: Any, where: str) -> list[Tool] | None:
    """The JSON schemas of a sample's tools, as a list or as JSON text; None where it has none."""
    if isinstance(value, str):
        try:
            value = json.loads(value or "null")
        except (ValueError, RecursionError) as error:
            raise CalibrationError(f"{where}: tools are not JSON ({error})") from error
    if not value:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise CalibrationError(f"{where}: expected tools as a list of JSON schemas")
    return value
