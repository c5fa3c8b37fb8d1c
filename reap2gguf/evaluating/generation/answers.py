"""Answers that are finished, kept line by line, so that none is made twice.

An answer belongs to the bytes of its model, to the problem, and to how it was asked.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from reap2gguf.atomic import open_own, output_errors
from reap2gguf.errors import ArtifactError
from reap2gguf.evaluating.generation.prompts import STYLES, Style
from reap2gguf.files import open_plain

FORMAT = 1
_MOST_BYTES = 2**30  # of the file
_LONGEST_LINE = 2**24
_SAMPLES, _SAMPLE_BYTES = 64, 2**14  # of a file of weights
_SMALL_FILES = (".json", ".jinja", ".txt", ".model")


@dataclass(frozen=True)
class Answer:
    """What a model wrote."""

    key: str
    task_id: str
    style: Style  # how it was asked
    text: str


def answer_key(values: Mapping[str, Any]) -> str:
    """The name of the answer to one question: a hash of all that decides it, plain JSON."""
    text = json.dumps({"format": FORMAT, **values}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


class Answers:
    """The answers of one file, and new ones added to its end."""

    def __init__(self, descriptor: int, path: Path, found: Iterable[Answer]) -> None:
        self._descriptor, self._path = descriptor, path
        self._found = {one.key: one for one in found}

    def get(self, key: str) -> Answer | None:
        """A finished answer; None if there is none yet."""
        return self._found.get(key)

    def add(self, answer: Answer) -> None:
        """Keep an answer. Raises OutputError if the disk fails."""
        line = json.dumps(asdict(answer)).encode() + b"\n"
        with output_errors(self._path):
            view = memoryview(line)
            while view:
                view = view[os.write(self._descriptor, view) :]
        self._found[answer.key] = answer


@contextmanager
def kept_answers(path: Path) -> Iterator[Answers]:
    """Open a file of answers, and create it if it is missing.

    A line that an interrupted run did not finish is removed. Raises OutputError if it cannot be
    written, and ArtifactError if it is something else.
    """
    with output_errors(path):
        descriptor = open_own(path)
    try:
        found, n_bytes = _read(descriptor, path)
        with output_errors(path):
            os.ftruncate(descriptor, n_bytes)
            os.lseek(descriptor, n_bytes, os.SEEK_SET)
        yield Answers(descriptor, path, found)
    finally:
        os.close(descriptor)


def _read(descriptor: int, path: Path) -> tuple[list[Answer], int]:
    """The answers in a file, and the bytes of its whole lines."""
    size = os.fstat(descriptor).st_size
    if size > _MOST_BYTES:
        raise ArtifactError(f"{path}: {size:,} bytes, expected answers of a model; remove it")
    found, n_bytes = [], 0
    with os.fdopen(os.dup(descriptor), "rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(_LONGEST_LINE), b""), 1):
            if not line.endswith(b"\n"):
                break
            n_bytes += len(line)
            found.append(_answer(line, f"{path}: line {number}"))
    return found, n_bytes


def _answer(line: bytes, where: str) -> Answer:
    try:
        values = json.loads(line)
        answer = Answer(**values)
        if not all(isinstance(one, str) for one in values.values()) or answer.style not in STYLES:
            raise TypeError
    except (ValueError, TypeError, RecursionError) as error:
        raise ArtifactError(f"{where} is not an answer of a model; remove the file") from error
    return answer


def fingerprint(path: Path) -> str:
    """A hash of a model: of a file, or of a folder's weights, config and tokenizer.

    Of large files, their sizes and samples of their bytes. Raises ArtifactError if one cannot be
    read.
    """
    found = hashlib.sha256()
    files = [path]
    if path.is_dir():
        kinds = (".safetensors", *_SMALL_FILES)
        files = sorted(one for one in path.iterdir() if one.name.endswith(kinds))
    for file in files:
        try:
            _add(found, file)
        except OSError as error:
            raise ArtifactError(f"{file}: cannot be read ({error.strerror or error})") from error
    return found.hexdigest()


def _add(found: Any, file: Path) -> None:
    with open_plain(file) as opened:
        size = os.fstat(opened.fileno()).st_size
        found.update(f"{file.name if file.suffix != '.gguf' else ''}:{size}\n".encode())
        for sample in range(_SAMPLES):
            place = sample * max(0, size - _SAMPLE_BYTES) // (_SAMPLES - 1)
            found.update(os.pread(opened.fileno(), _SAMPLE_BYTES, place))
