"""A process of its own in which llama-cpp-python runs a file, seen from outside.

llama.cpp ends its process where a file contradicts itself or memory is too small. Here that is an
error of one line.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import reap2gguf
from reap2gguf.errors import ArtifactError, DependencyError, Reap2ggufError, UsageError
from reap2gguf.local.frames import Problem, receive, send
from reap2gguf.local.running import INSTALL
from reap2gguf.messages import shown

_BOOT = (
    "import sys; sys.path.append(sys.argv[1]); "
    "from importlib import import_module; import_module(sys.argv[2]).main()"
)
_LOG_BYTES = 2**16  # of the end of what llama.cpp wrote, where it says why it ended


@dataclass(frozen=True)
class Advice:
    """What a user can do, in the words of a command."""

    without_llama: str  # in place of llama-cpp-python, after "run `pip install ...`"
    less_memory: str  # to need less memory


class LlamaProcess:
    """A process that runs a module of this package. Close it, whatever happens."""

    def __init__(self, path: Path, module: str, setup: Mapping[str, Any], advice: Advice) -> None:
        """Start `main` of a module, which answers `setup` when it has loaded the file at `path`.

        Raises ArtifactError if the file is broken or llama.cpp refuses it, and DependencyError if
        llama-cpp-python does not load.
        """
        self._path, self._advice = path, advice
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        folder = Path(str(reap2gguf.__file__)).absolute().parents[1]
        # a session of its own, so that Ctrl-C reaches only this process; without a debugger that
        # prints where llama.cpp was when it ended
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", _BOOT, str(folder), module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={**os.environ, "GGML_NO_BACKTRACE": "1"},
            start_new_session=True,
        )
        try:
            self.send({"path": str(path), **setup})
            self.loaded = self.receive()  # the answer to `setup`
            if "problem" in self.loaded:
                raise self.error(self.loaded)
        except BaseException:
            self.close()
            raise

    def send(self, message: Mapping[str, Any], data: memoryview | None = None) -> None:
        """Write a message, and the bytes that follow it. Raises ArtifactError if it has ended."""
        assert self._process.stdin is not None
        try:
            send(self._process.stdin, message)
            if data is not None:
                self._process.stdin.write(data)
                self._process.stdin.flush()
        except BrokenPipeError as error:
            raise self._ended() from error

    def receive(self) -> dict[str, Any]:
        """The next answer. Raises ArtifactError if the process has ended."""
        assert self._process.stdout is not None
        answer = receive(self._process.stdout)
        if answer is None:
            raise self._ended()
        return answer

    def receive_into(self, target: memoryview) -> None:
        """Fill `target` with what follows an answer. Raises ArtifactError if it has ended."""
        assert self._process.stdout is not None
        if not target.nbytes:  # which memoryview does not cast
            return
        target = target.cast("B")
        while target.nbytes:
            n_bytes = self._process.stdout.readinto(target)  # type: ignore[attr-defined]
            if not n_bytes:
                raise self._ended()
            target = target[n_bytes:]

    def error(self, answer: Mapping[str, Any]) -> Reap2ggufError:
        """The error of an answer that reports one."""
        reason = shown(answer["problem"])[1:-1].rstrip(".")
        more = f"if memory is too small, {self._advice.less_memory}"
        if answer["kind"] == Problem.IMPORT:
            return DependencyError(
                f"llama-cpp-python does not load ({reason}); run `{INSTALL}`, or "
                f"{self._advice.without_llama}"
            )
        if answer["kind"] == Problem.LOAD:
            return ArtifactError(
                f"{self._path}: llama.cpp cannot run it ({reason}{self._said()}); check the file "
                f"with `reap2gguf verify`; {more}"
            )
        # "Requested tokens (900) exceed context window of 512"
        hint = "; pass a larger --context" if "context window" in reason else ""
        return UsageError(f"llama-cpp-python: {reason}{hint}")

    def _ended(self) -> ArtifactError:
        """The error for a process that has ended by itself."""
        status = self._process.wait()
        how = signal.Signals(-status).name if status < 0 else f"exit code {status}"
        return ArtifactError(
            f"{self._path}: llama.cpp ended while it ran this file ({how}{self._said()}); check "
            f"the file with `reap2gguf verify`; if memory is too small, {self._advice.less_memory}"
        )

    def _said(self) -> str:
        """The last error that llama.cpp printed, after a colon; empty if it printed none."""
        self._log.seek(max(0, self._log.seek(0, os.SEEK_END) - _LOG_BYTES))
        lines = self._log.read().decode("utf-8", "replace").splitlines()
        said = [line for line in lines if "GGML_ASSERT" in line or "error" in line.lower()]
        return f": {shown(said[-1].strip())[1:-1]}" if said else ""

    def close(self) -> None:
        """End the process, whatever it does."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        self._log.close()
