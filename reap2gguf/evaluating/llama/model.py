"""A GGUF file that llama.cpp has loaded, in a process of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from reap2gguf.errors import UsageError
from reap2gguf.gguf_files.reader import read_gguf_header
from reap2gguf.local.header_check import check_header
from reap2gguf.local.llama_process import Advice, LlamaProcess
from reap2gguf.machine import available_threads
from reap2gguf.messages import shown

_ADVICE = Advice(
    without_llama="choose another engine",
    less_memory="use a machine with more, or a smaller batch",
)
_MOST_THREADS = 512  # GGML_MAX_N_THREADS
_MOST_BATCH = 2**16


@dataclass(frozen=True)
class LlamaOptions:
    """How llama.cpp runs a file; the defaults are those of its programs."""

    threads: int = field(default_factory=available_threads)
    gpu_layers: int = -1  # -1 is all of them, if llama.cpp was built for a GPU; 0 is none
    batch: int = 2048  # tokens per call, its --batch-size
    ubatch: int = 512  # tokens computed at once, its --ubatch-size

    def check(self) -> None:
        """Raises UsageError for a number that llama.cpp does not take."""
        for name, value, least, most in (
            ("threads", self.threads, 1, _MOST_THREADS),
            ("gpu_layers", self.gpu_layers, -1, 2**31 - 1),
            ("batch", self.batch, 1, _MOST_BATCH),
            ("ubatch", self.ubatch, 1, _MOST_BATCH),
        ):
            if type(value) is not int or not least <= value <= most:
                raise UsageError(
                    f"{name} for llama.cpp is {shown(value)}, expected {least} to {most:,}"
                )


class LlamaModel:
    """A loaded file. It answers one request at a time. A context manager."""

    def __init__(self, path: Path, options: LlamaOptions) -> None:
        """Load a file.

        Raises ArtifactError if it is broken or llama.cpp refuses it, UsageError for wrong options,
        and DependencyError if llama-cpp-python does not load.
        """
        options.check()
        header = read_gguf_header(path)
        check_header(path, header)
        self.path, self.options, self.header = path, options, header
        setup = {
            "threads": options.threads,
            "gpu_layers": options.gpu_layers,
            "batch": options.batch,
            "ubatch": options.ubatch,
        }
        self._process = LlamaProcess(path, "reap2gguf.evaluating.llama.worker", setup, _ADVICE)
        self.n_tokens: int = self._process.loaded["n_tokens"]  # of the vocabulary
        self.context_length: int = self._process.loaded["context_length"]
        self.on_gpu: bool = self._process.loaded["on_gpu"]
        self.peak_bytes = 0  # resident memory of the process, after the last answer

    def __enter__(self) -> LlamaModel:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the process, whatever it does."""
        self._process.close()

    def answers(
        self, request: Mapping[str, Any], data: memoryview | None = None
    ) -> Iterator[dict[str, Any]]:
        """Send a request, and take its answers. Raises ArtifactError if llama.cpp fails or ends."""
        self._process.send(request, data)
        return self._answers()

    def _answers(self) -> Iterator[dict[str, Any]]:
        while "peak" not in (answer := self._process.receive()):
            if "problem" in answer:
                raise self._process.error(answer)
            yield answer
        self.peak_bytes = answer["peak"]

    def read_into(self, target: memoryview) -> None:
        """Fill `target` with the numbers that follow an answer."""
        self._process.receive_into(target)
