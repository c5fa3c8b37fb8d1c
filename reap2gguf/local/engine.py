"""Run a GGUF file with llama-cpp-python, in a process of its own.

llama.cpp ends its process where a file contradicts itself, and a chat template may never end. So
`engine_process.py` runs the model, and the template is rendered by `tokenizer.templates` with its
limits; whatever happens there is one line here.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import reap2gguf
from reap2gguf.errors import ArtifactError, DependencyError, Reap2ggufError, UsageError
from reap2gguf.gguf_files.reader import read_gguf_header
from reap2gguf.local.engine_process import Problem, receive, send
from reap2gguf.local.header_check import check_header, usable_context
from reap2gguf.local.prompts import Prompts
from reap2gguf.local.running import INSTALL
from reap2gguf.messages import shown

if TYPE_CHECKING:
    from reap2gguf.local.running import AnswerOptions, EngineOptions

Message = Mapping[str, str]
_BOOT = (
    "import sys; sys.path.append(sys.argv[1]); "
    "from reap2gguf.local.engine_process import main; main()"
)
_LOG_BYTES = 2**16  # of the end of what llama.cpp wrote, where it says why it ended


class Engine:
    """A loaded model. It answers one question at a time: it has one context."""

    def __init__(self, path: Path, options: EngineOptions) -> None:
        """Load a model.

        Raises ArtifactError if the file is broken or llama.cpp refuses it, UsageError if its chat
        template is broken, and DependencyError if llama-cpp-python does not load.
        """
        header = read_gguf_header(path)
        check_header(path, header)
        self._prompts = Prompts(path, header)
        self.has_template = self._prompts.has_template
        self.context = usable_context(header, options.context)
        self.n_tokens = 0  # that the model has read so far: of the prompt and of its answer
        self._process = _Process(path, self.context, self._prompts.stop, options)

    def close(self) -> None:
        """Free the model's memory."""
        self._process.close()
        self._prompts.close()

    def pieces(self, messages: Sequence[Message], options: AnswerOptions) -> Generator[str]:
        """An answer piece by piece; a model without a chat template continues the text.

        Close the iterator to stop the answer. Raises UsageError if the messages and the answer do
        not fit the context, or if the template refuses the messages, and ArtifactError if
        llama.cpp ends.
        """
        yield from self.continuation(self._prompts.render(messages), self.has_template, options)

    def render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        """A conversation as the model reads it; with the beginning of an answer, or as it is.

        Raises UsageError if the template refuses the messages.
        """
        return self._prompts.render(messages, add_generation_prompt=add_generation_prompt)

    def continuation(
        self, prompt: str, is_rendered: bool, options: AnswerOptions
    ) -> Generator[str]:
        """What follows a text, piece by piece, as `pieces` gives it.

        `is_rendered`: the text is a template's, and has the token for its beginning.
        """
        request = {
            "prompt": prompt,
            "is_chat": is_rendered,
            "temperature": options.temperature,
            "max_tokens": options.max_tokens,
            "seed": options.seed,
        }
        self._process.send(request)
        while "piece" in (answer := self._process.receive()):
            self.n_tokens = answer["n_tokens"]
            try:
                yield answer["piece"]
            except GeneratorExit:
                self._process.send({})  # stop
                while "piece" in self._process.receive():
                    pass
                raise
        if "problem" in answer:
            raise self._process.error(answer)
        self.n_tokens = answer["n_tokens"]


class _Process:
    """The process that runs a model."""

    def __init__(self, path: Path, context: int, stop: str, options: EngineOptions) -> None:
        """Start it and load the model. Raises as `Engine` does."""
        self._path = path
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        folder = Path(str(reap2gguf.__file__)).absolute().parents[1]
        # a session of its own, so that Ctrl-C reaches only this process; without a debugger that
        # prints where llama.cpp was when it ended
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", _BOOT, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={**os.environ, "GGML_NO_BACKTRACE": "1"},
            start_new_session=True,
        )
        try:
            self.send(
                {
                    "path": str(path),
                    "context": context,
                    "stop": stop,
                    "threads": options.threads,
                    "gpu_layers": options.gpu_layers,
                }
            )
            if "problem" in (answer := self.receive()):
                raise self.error(answer)
        except BaseException:
            self.close()
            raise

    def send(self, message: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            send(self._process.stdin, message)
        except BrokenPipeError as error:
            raise self._ended() from error

    def receive(self) -> dict[str, Any]:
        """The next answer. Raises ArtifactError if the process has ended."""
        assert self._process.stdout is not None
        answer = receive(self._process.stdout)
        if answer is None:
            raise self._ended()
        return answer

    def error(self, answer: Mapping[str, Any]) -> Reap2ggufError:
        """The error of an answer that reports one."""
        reason = shown(answer["problem"])[1:-1].rstrip(".")
        if answer["kind"] == Problem.IMPORT:
            return DependencyError(
                f"llama-cpp-python does not load ({reason}); run `{INSTALL}`, or build llama.cpp "
                "and pass --llama-cpp DIR"
            )
        if answer["kind"] == Problem.LOAD:
            return ArtifactError(
                f"{self._path}: llama.cpp cannot run it ({reason}); check the file with "
                "`reap2gguf verify`; if memory is too small, pass a smaller --context or "
                "--gpu-layers 0"
            )
        # "Requested tokens (900) exceed context window of 512"
        hint = "; pass a larger --context" if "context window" in reason else ""
        return UsageError(f"llama-cpp-python: {reason}{hint}")

    def _ended(self) -> ArtifactError:
        """The error for a process that has ended by itself."""
        status = self._process.wait()
        how = signal.Signals(-status).name if status < 0 else f"exit code {status}"
        self._log.seek(max(0, self._log.seek(0, os.SEEK_END) - _LOG_BYTES))
        lines = self._log.read().decode("utf-8", "replace").splitlines()
        said = [line for line in lines if "GGML_ASSERT" in line or "error" in line.lower()]
        reason = f": {shown(said[-1].strip())[1:-1]}" if said else ""
        return ArtifactError(
            f"{self._path}: llama.cpp ended while it ran this file ({how}{reason}); check the file "
            "with `reap2gguf verify`; if memory is too small, pass a smaller --context"
        )

    def close(self) -> None:
        """End the process, whatever it does."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        self._log.close()
