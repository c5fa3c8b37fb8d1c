"""Run a GGUF file in this process with llama-cpp-python.

Nothing here may load the package's own libggml: llama_cpp contains one of the same name and fails
if the other was loaded first.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reap2gguf.errors import ArtifactError, DependencyError, UsageError
from reap2gguf.gguf_files.reader import GgufHeader, read_gguf_header
from reap2gguf.messages import shown
from reap2gguf.models.description import is_of_experts

INSTALL = "pip install 'reap2gguf[llama]'"
Message = Mapping[str, str]
_CONTEXT_STEP = 256
_MAX_LAYERS, _MAX_EXPERTS = 512, 1024  # LLAMA_MAX_LAYERS and LLAMA_MAX_EXPERTS


@dataclass(frozen=True)
class EngineOptions:
    """How to run a model, in this process or by another program."""

    context: int  # tokens; the model's own context length is the limit
    threads: int
    gpu_layers: int  # -1 is all of them, if llama.cpp was built for a GPU


@dataclass(frozen=True)
class AnswerOptions:
    """How to choose the tokens of an answer."""

    temperature: float = 0.8
    max_tokens: int | None = None  # None: until the context is full
    seed: int | None = None
    system: str | None = None  # the system prompt


def is_installed() -> bool:
    """Whether llama-cpp-python is installed, without loading it."""
    return importlib.util.find_spec("llama_cpp") is not None


class Engine:
    """A loaded model. It answers one question at a time: it has one context."""

    def __init__(self, path: Path, options: EngineOptions) -> None:
        """Load a model.

        Raises ArtifactError if the file is broken or llama.cpp refuses it, and DependencyError if
        llama-cpp-python does not load.
        """
        header = read_gguf_header(path)
        check_counts(path, header)
        self.has_template = isinstance(header.metadata.get("tokenizer.chat_template"), str)
        self.context = usable_context(header, options.context)
        self._llama = _load(path, self.context, options)

    def close(self) -> None:
        """Free the model's memory."""
        self._llama.close()

    def pieces(self, messages: Sequence[Message], options: AnswerOptions) -> Iterator[str]:
        """An answer piece by piece; a model without a chat template continues the text.

        Raises UsageError if the messages and the answer do not fit the context, or if the template
        refuses the messages.
        """
        settings: dict[str, Any] = {
            "temperature": options.temperature,
            "max_tokens": options.max_tokens,
            "seed": options.seed,
            "stream": True,
        }
        with _refusals():
            if self.has_template:
                chunks = self._llama.create_chat_completion(list(messages), **settings)
                for chunk in chunks:
                    yield chunk["choices"][0]["delta"].get("content") or ""
            else:
                text = "\n".join(message["content"] for message in messages)
                for chunk in self._llama.create_completion(text, **settings):
                    yield chunk["choices"][0]["text"]

    @property
    def n_tokens(self) -> int:
        """Tokens that the model has read so far: of the prompt and of its answer."""
        return int(self._llama.n_tokens)


@contextmanager
def _refusals() -> Iterator[None]:
    """Report what llama-cpp-python or a chat template refuses as a UsageError."""
    from jinja2 import TemplateError

    try:
        yield
    except (ValueError, TemplateError) as error:
        # "Requested tokens (900) exceed context window of 512"
        hint = "; pass a larger --context" if "context window" in str(error) else ""
        raise UsageError(f"llama-cpp-python: {str(error).rstrip('.')}{hint}") from error


def check_counts(path: Path, header: GgufHeader) -> None:
    """Refuse counts at which llama.cpp aborts the whole process.

    See load_hparams in llama.cpp's src/llama-model.cpp. Raises ArtifactError.
    """
    arch = header.metadata.get("general.architecture")
    if not isinstance(arch, str):
        return  # llama.cpp reports it

    def bounded(key: str, most: int) -> int:
        value = header.metadata.get(f"{arch}.{key}", 0)
        highest = max(value, default=0) if isinstance(value, Sequence) else value
        if type(highest) is not int or not 0 <= highest <= most:
            raise ArtifactError(f"{path}: {arch}.{key} is {shown(value)}, expected 0 to {most:,}")
        return highest

    n_layers = bounded("block_count", _MAX_LAYERS)
    bounded("nextn_predict_layers", n_layers)
    n_experts = bounded("expert_count", _MAX_EXPERTS)
    n_used = bounded("expert_used_count", n_experts)
    if n_experts and not n_used:
        raise ArtifactError(f"{path}: {arch}.expert_used_count is 0, expected 1 to {n_experts}")
    for name in header.tensors:
        if is_of_experts(name) and not n_experts:
            raise ArtifactError(
                f"{path}: {shown(name)} holds experts, but {arch}.expert_count is 0"
            )


def usable_context(header: GgufHeader, wanted: int) -> int:
    """The wanted context in tokens, limited to the model's own and rounded up to llama.cpp's step.

    llama.cpp rounds up by itself; llama-cpp-python then fills arrays of the number before.
    """
    metadata = header.metadata
    trained = metadata.get(f"{metadata.get('general.architecture')}.context_length")
    most = min(wanted, trained) if isinstance(trained, int) and trained > 0 else wanted
    return -(-most // _CONTEXT_STEP) * _CONTEXT_STEP


def _load(path: Path, context: int, options: EngineOptions) -> Any:
    try:
        from llama_cpp import Llama
    except (ImportError, OSError, RuntimeError) as error:
        raise DependencyError(
            f"llama-cpp-python does not load ({error}); run `{INSTALL}`, or build llama.cpp and "
            "pass --llama-cpp DIR"
        ) from error
    try:
        return Llama(
            str(path),
            n_ctx=context,
            n_threads=options.threads,
            n_threads_batch=options.threads,
            n_gpu_layers=options.gpu_layers,
            verbose=False,
        )
    except (ValueError, RuntimeError, OSError) as error:
        raise ArtifactError(
            f"{path}: llama.cpp cannot run it ({shown(str(error))}); check the file with "
            "`reap2gguf verify`; if memory is too small, pass a smaller --context or --gpu-layers 0"
        ) from error
