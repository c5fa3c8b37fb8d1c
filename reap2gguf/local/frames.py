"""Messages between this program and a process that runs llama.cpp.

A message is a frame: four bytes for the length, then JSON. Arrays of numbers follow some messages
as they are in memory; the message says how many there are. Nothing here may load the package's own
libggml: llama_cpp contains one of the same name and fails if the other was loaded first.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from enum import StrEnum
from typing import IO, Any, Protocol

_LENGTH = struct.Struct(">I")


class Pipe(Protocol):
    """A pipe that gives as many bytes as were asked for, but at its end."""

    def read(self, count: int, /) -> bytes: ...


class Problem(StrEnum):
    """What failed."""

    IMPORT = "import"
    LOAD = "load"
    ANSWER = "answer"


def send(pipe: IO[bytes], message: Mapping[str, Any]) -> None:
    """Write a message."""
    body = json.dumps(message).encode()
    pipe.write(_LENGTH.pack(len(body)) + body)
    pipe.flush()


def receive(pipe: Pipe) -> dict[str, Any] | None:
    """Read a message; None at the end."""
    header = pipe.read(_LENGTH.size)
    if len(header) < _LENGTH.size:
        return None
    length = _LENGTH.unpack(header)[0]
    body = pipe.read(length)
    return dict(json.loads(body)) if len(body) == length else None


def own_pipes() -> tuple[IO[bytes], IO[bytes]]:
    """The pipes of a process for requests, without a buffer, and for answers.

    What llama.cpp prints to the standard output is no answer: it goes where errors go.
    """
    requests = os.fdopen(os.dup(0), "rb", buffering=0)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return requests, answers


def receive_whole(pipe: IO[bytes]) -> dict[str, Any] | None:
    """As `receive`, from a pipe without a buffer, so that `select` sees what is not read yet."""
    return receive(_Whole(pipe))


class _Whole:
    """Reads as many bytes as were asked for, where a pipe gives what is there."""

    def __init__(self, pipe: IO[bytes]) -> None:
        self._pipe = pipe

    def read(self, count: int) -> bytes:
        data = bytearray()
        while len(data) < count and (piece := self._pipe.read(count - len(data))):
            data += piece
        return bytes(data)
