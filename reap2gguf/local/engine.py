"""A GGUF file run in this process by llama-cpp-python.

Nothing here may load the package's own libggml: llama_cpp brings one of the same name, and fails
where the other was loaded first.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
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
    """How a model is run."""

    context: int  # tokens; the model's own context length bounds it
    threads: int
    gpu_layers: int  # -1 is all of them, where llama.cpp was built for a GPU


def is_installed() -> bool:
    """Whether llama-cpp-python is there, found out without loading it."""
    return importlib.util.find_spec("llama_cpp") is not None


class Engine:
    """A loaded model. One answer at a time: it has one context."""

    def __init__(self, path: Path, options: EngineOptions) -> None:
        """Load a model; ArtifactError if the file is broken or llama.cpp refuses it."""
        header = read_gguf_header(path)
        _check_counts(path, header)
        self.has_template = isinstance(header.metadata.get("tokenizer.chat_template"), str)
        self.context = _context(header.metadata, options.context)
        self._llama = _load(path, self.context, options)
        self._llama.generate = self._watched(self._llama.generate)
        self._before_token: Callable[[], None] | None = None

    def close(self) -> None:
        """Give the model's memory back."""
        self._llama.close()

    @contextmanager
    def watched_by(self, before_token: Callable[[], None]) -> Iterator[None]:
        """While open, call this before each token of an answer; what it raises ends the answer."""
        self._before_token = before_token
        try:
            yield
        finally:
            self._before_token = None

    def _watched(self, generate: Callable[..., Iterator[int]]) -> Callable[..., Iterator[int]]:
        def tokens(*arguments: Any, **named: Any) -> Iterator[int]:
            for token in generate(*arguments, **named):
                if self._before_token is not None:
                    self._before_token()
                yield token

        return tokens

    def chat(self, messages: Sequence[Message], **settings: Any) -> Any:
        """OpenAI's chat completion, or its chunks with `stream=True`, by the model's own template.

        Raises UsageError if the messages and the answer have no room in the context, or the
        template refuses the messages.
        """
        return self._told(self._llama.create_chat_completion, list(messages), settings)

    def complete(self, prompt: str, **settings: Any) -> Any:
        """OpenAI's completion of a text; as `chat`."""
        return self._told(self._llama.create_completion, prompt, settings)

    def pieces(self, messages: Sequence[Message], **settings: Any) -> Iterator[str]:
        """An answer piece by piece as it comes; a model without a template goes on with the text.

        Raises as `chat`.
        """
        if self.has_template:
            for chunk in self.chat(messages, stream=True, **settings):
                yield chunk["choices"][0]["delta"].get("content") or ""
        else:
            text = "\n".join(message["content"] for message in messages)
            for chunk in self.complete(text, stream=True, **settings):
                yield chunk["choices"][0]["text"]

    @property
    def n_tokens(self) -> int:
        """Tokens that the model has read so far: of the prompt, and of its answer."""
        return int(self._llama.n_tokens)

    def _told(self, function: Any, first: Any, settings: Mapping[str, Any]) -> Any:
        with _refusals():
            result = function(first, **settings)
        return _told_chunks(result) if settings.get("stream") else result


def _told_chunks(chunks: Iterator[Any]) -> Iterator[Any]:
    with _refusals():
        yield from chunks


@contextmanager
def _refusals() -> Iterator[None]:
    """What llama-cpp-python and a chat template refuse, as a UsageError."""
    from jinja2 import TemplateError

    try:
        yield
    except (ValueError, TemplateError) as error:
        # "Requested tokens (900) exceed context window of 512"
        hint = "; pass a larger --context" if "context window" in str(error) else ""
        raise UsageError(f"llama-cpp-python: {str(error).rstrip('.')}{hint}") from error


def _check_counts(path: Path, header: GgufHeader) -> None:
    """Refuse counts at which llama.cpp ends the whole process; ArtifactError.

    See load_hparams in llama.cpp's src/llama-model.cpp.
    """
    arch = header.metadata.get("general.architecture")
    if not isinstance(arch, str):
        return  # llama.cpp says so

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
        raise ArtifactError(f"{path}: {arch}.expert_used_count is 0, of {n_experts} experts")
    for name in header.tensors:
        if is_of_experts(name) and not n_experts:
            raise ArtifactError(f"{path}: {shown(name)} is of experts, {arch}.expert_count is 0")


def _context(metadata: Mapping[str, Any], wanted: int) -> int:
    """The context asked for, within what the model was trained for, in whole steps of llama.cpp's.

    llama.cpp rounds up by itself; llama-cpp-python then fills arrays of the number before.
    """
    trained = metadata.get(f"{metadata.get('general.architecture')}.context_length")
    most = min(wanted, trained) if isinstance(trained, int) and trained > 0 else wanted
    return -(-most // _CONTEXT_STEP) * _CONTEXT_STEP


def _load(path: Path, context: int, options: EngineOptions) -> Any:
    try:
        from llama_cpp import Llama
    except (ImportError, OSError, RuntimeError) as error:
        raise DependencyError(
            f"llama-cpp-python does not load ({error}); run `{INSTALL}`, or pass --llama-cpp DIR "
            "with a llama.cpp of yours"
        ) from error
    try:
        return Llama(
            str(path), n_ctx=context, n_threads=options.threads,
            n_threads_batch=options.threads, n_gpu_layers=options.gpu_layers, verbose=False,
        )  # fmt: skip
    except (ValueError, RuntimeError, OSError) as error:
        raise ArtifactError(
            f"{path}: llama.cpp cannot run it ({shown(str(error))}); check it with `reap2gguf "
            "verify`, or there is too little memory: pass a smaller --context or --gpu-layers 0"
        ) from error
