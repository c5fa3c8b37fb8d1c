"""Processes that quantize and dequantize rows of ik_llama.cpp's types.

As many are started as threads ask at a time, up to the processors of this machine. Each holds one
request and its answer; rows are sent in pieces of bounded size. They end with this process: their
input ends then.
"""

from __future__ import annotations

import importlib.util
import os
import struct
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from reap2gguf.errors import DependencyError
from reap2gguf.gguf_files.tensor_types import LOADER, IkType, columns_of, is_ik, row_bytes
from reap2gguf.machine import available_threads
from reap2gguf.quantizing.ik import worker

if TYPE_CHECKING:
    from collections.abc import Iterable

    from reap2gguf.quantizing.resolve import ResolvedRecipe

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

PACKAGE = "ik-llama-cpp-python"
EXTRA = "pip install 'reap2gguf[ik]'"
_MODULE = "ik_llama_cpp"
_LIBRARIES = ("libggml.so", "libggml.dylib")
_MOST_VALUES = 2**22  # of a request: 16 MiB of float32
_LARGE = 1000.0  # values that scales in F16 may not reach


class RangeError(ValueError):
    """Values that a type cannot hold."""


def library_path() -> Path | None:
    """The libggml of ik_llama.cpp; None if the package is not installed."""
    spec = importlib.util.find_spec(_MODULE)
    for root in (spec.submodule_search_locations or []) if spec else []:
        for name in _LIBRARIES:
            if (path := Path(root) / "lib" / name).is_file():
                return path
    return None


def is_installed() -> bool:
    """Whether ik_llama.cpp's types can be quantized and read here."""
    return library_path() is not None


def package_version() -> str:
    """The version of the package, which decides the bytes of its types; "missing" without it."""
    try:
        return version(PACKAGE)
    except PackageNotFoundError:
        return "missing"


def needs_package(what: str) -> str:
    """What to say where the package is missing; `what` needs it."""
    return (
        f"{what} needs {PACKAGE}, which quantizes and reads the types of {LOADER}; install it with "
        f"`{EXTRA}`"
    )


def check_installed(recipes: Iterable[ResolvedRecipe]) -> None:
    """Raise DependencyError if a recipe has types that cannot be quantized here."""
    for recipe in recipes:
        if any(map(is_ik, recipe.tensor_types().values())) and not is_installed():
            raise DependencyError(needs_package(f"recipe {recipe.name}"))


@dataclass
class _Process:
    """A worker that runs, and the file that its errors go to."""

    running: subprocess.Popen[bytes]
    errors: IO[bytes]
    said: str = ""  # once it has ended


@dataclass
class IkWorkers:
    """The processes of one library."""

    library: Path
    most: int
    _idle: list[_Process] = field(default_factory=list)
    _n_started: int = 0
    _change: threading.Condition = field(default_factory=threading.Condition)

    def quantize(self, rows: Floats, tensor_type: IkType, importance: Floats | None) -> Bytes:
        """Rows (R, C) as (R, bytes of a row). Raises RangeError, or DependencyError if it fails."""
        n_rows, n_columns = rows.shape
        n_bytes = row_bytes(tensor_type, n_columns)
        target = np.empty((n_rows, n_bytes), dtype=np.uint8)
        weights = b"" if importance is None else _raw(importance, np.float32)
        for part in _pieces(n_rows, n_columns):
            sent = rows[part]
            head = (worker.QUANTIZE, tensor_type, len(sent), n_columns, n_bytes, bool(weights))
            answer = self._ask(head, [_raw(sent, np.float32), weights], tensor_type)
            target[part] = np.frombuffer(answer, np.uint8).reshape(len(sent), n_bytes)
        largest = float(np.abs(rows).max(initial=0))
        if largest > _LARGE and self._is_lost(rows, target, tensor_type):
            raise RangeError(f"values up to {largest:g} are beyond {tensor_type.name}'s range")
        return target

    def _is_lost(self, rows: Floats, target: Bytes, tensor_type: IkType) -> bool:
        """Whether any row became NaN, infinite or zero: the library does not say it."""
        found = self.dequantize(target, tensor_type)
        return not np.isfinite(found).all() or bool((rows.any(axis=1) & ~found.any(axis=1)).any())

    def dequantize(self, raw: Bytes, tensor_type: IkType) -> Floats:
        """Rows (R, bytes of a row) as values (R, C). Raises DependencyError if it fails."""
        n_rows, n_bytes = raw.shape
        n_columns = columns_of(tensor_type, n_bytes)
        values = np.empty((n_rows, n_columns), dtype=np.float32)
        for part in _pieces(n_rows, n_columns):
            sent = raw[part]
            head = (worker.DEQUANTIZE, tensor_type, len(sent), n_columns, n_bytes, False)
            answer = self._ask(head, [_raw(sent, np.uint8)], tensor_type)
            values[part] = np.frombuffer(answer, np.float32).reshape(len(sent), n_columns)
        return values

    def describe(self, tensor_type: IkType, n_columns: int) -> tuple[int, int, int]:
        """What the library says: values and bytes of a block, and bytes of a row."""
        head = (worker.DESCRIBE, tensor_type, 0, n_columns, 0, False)
        block, size, row = struct.unpack("<qqq", self._ask(head, [], tensor_type))
        return block, size, row

    def close(self) -> None:
        """End the processes that are idle."""
        with self._change:
            idle, self._idle = self._idle, []
            self._n_started -= len(idle)
        for process in idle:
            _end(process)

    def _ask(
        self, head: tuple[int, ...], parts: list[memoryview | bytes], tensor_type: IkType
    ) -> bytes:
        process = self._take()
        try:
            answer = _exchange(process, worker.HEAD.pack(*head), parts)
        except (OSError, EOFError) as error:
            _end(process)
            self._lose()
            raise DependencyError(
                f"{self.library}: its process ended while it worked on {tensor_type.name} "
                f"({_why(process)}); run the command again, and report it if it ends again"
            ) from error
        except BaseException:
            _end(process)  # what it still answers belongs to nobody
            self._lose()
            raise
        self._give_back(process)
        kind, data = answer
        if kind == worker.DONE:
            return data
        raise DependencyError(
            f"{self.library}: {tensor_type.name} {data.decode('utf-8', 'replace')}; this version "
            f"of {PACKAGE} has another format"
        )

    def _take(self) -> _Process:
        with self._change:
            while not self._idle and self._n_started >= self.most:
                self._change.wait()
            if self._idle:
                return self._idle.pop()
            self._n_started += 1
        try:
            return _start(self.library)
        except OSError as error:
            self._lose()
            raise DependencyError(f"{self.library}: no process of it starts ({error})") from error

    def _give_back(self, process: _Process) -> None:
        with self._change:
            self._idle.append(process)
            self._change.notify()

    def _lose(self) -> None:
        with self._change:
            self._n_started -= 1
            self._change.notify()


@cache
def ik_workers() -> IkWorkers:
    """The processes of this machine. Raises DependencyError without the package."""
    path = library_path()
    if path is None:
        raise DependencyError(needs_package(f"a file with types of {LOADER}"))
    return IkWorkers(path, most=available_threads())


def _start(library: Path) -> _Process:
    command = [sys.executable, "-I", "-S", str(Path(worker.__file__)), str(library)]
    # a pipe that nobody reads would fill up; `_end` closes it
    errors = tempfile.TemporaryFile()  # noqa: SIM115
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    try:
        running = subprocess.Popen(
            command,
            env=environment,
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
        )
        return _Process(running, errors)
    except OSError:
        errors.close()
        raise


def _exchange(process: _Process, head: bytes, parts: list[memoryview | bytes]) -> tuple[int, bytes]:
    """Send a request and wait for the answer. Raises OSError or EOFError if the process ends."""
    source, target = process.running.stdout, process.running.stdin
    assert source is not None
    assert target is not None
    for part in (head, *parts):
        _write(target, part)
    kind, n_bytes = worker.ANSWER.unpack(_read(source, worker.ANSWER.size))
    return kind, _read(source, n_bytes)


def _write(stream: IO[bytes], part: memoryview | bytes) -> None:
    view = memoryview(part)
    while view:
        view = view[stream.write(view) :]


def _read(stream: IO[bytes], n_bytes: int) -> bytes:
    found = bytearray()
    while len(found) < n_bytes:
        part = stream.read(n_bytes - len(found))
        if not part:
            raise EOFError
        found += part
    return bytes(found)


def _end(process: _Process) -> None:
    running = process.running
    for stream in (running.stdin, running.stdout):
        if stream is not None:
            with suppress(OSError):  # what was not yet sent, to a process that has ended
                stream.close()
    try:
        running.wait(1)
    except subprocess.TimeoutExpired:
        running.kill()
        running.wait()
    process.errors.seek(0)
    process.said = process.errors.read().decode("utf-8", "replace").strip()
    process.errors.close()


def _why(process: _Process) -> str:
    """What a process that has ended says of it: a signal, or the last line of its errors."""
    code = process.running.returncode
    if code < 0:
        return f"signal {-code}"
    lines = process.said.splitlines()
    return lines[-1] if lines else f"exit code {code}"


def _pieces(n_rows: int, n_columns: int) -> list[slice]:
    step = max(1, _MOST_VALUES // max(1, n_columns))
    return [slice(first, min(first + step, n_rows)) for first in range(0, n_rows, step)]


def _raw(values: npt.NDArray[np.generic], dtype: type[np.generic]) -> memoryview:
    return np.ascontiguousarray(values, dtype=dtype).reshape(-1).view(np.uint8).data
