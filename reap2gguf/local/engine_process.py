"""The process that runs a model for `chat`; `engine.py` starts it.

It loads the model of the first message and answers each later one, piece by piece. An empty message
stops an answer. Messages are frames: four bytes for the length, then JSON.

Nothing here may load the package's own libggml: llama_cpp contains one of the same name and fails
if the other was loaded first.
"""

from __future__ import annotations

import json
import os
import select
import struct
from collections.abc import Callable, Iterator, Mapping
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


class _Uncompiled:
    """In the place of llama-cpp-python's template, which compiles without a limit of memory."""

    def __init__(self, **others: Any) -> None:
        pass

    def to_chat_handler(self) -> None:
        return None


def use_rendered_prompts(name: str, prompt: Callable[[], str], stop: Callable[[], str]) -> None:
    """Let llama-cpp-python take prompts that are rendered elsewhere, as the chat format `name`.

    It compiles no template any more. An answer ends at the text that `stop` gives.
    """
    from llama_cpp import llama_chat_format

    def rendered(messages: Any, **others: Any) -> Any:
        return llama_chat_format.ChatFormatterResponse(
            prompt(), stop=stop() or None, added_special=True
        )

    llama_chat_format.register_chat_format(name)(rendered)
    vars(llama_chat_format)["Jinja2ChatFormatter"] = _Uncompiled


def main() -> None:
    """Load a model and answer messages until there are no more."""
    requests = os.fdopen(os.dup(0), "rb", buffering=0)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what llama.cpp prints is no answer
    setup = _receive_whole(requests)
    if setup is None:
        return
    try:
        from llama_cpp import Llama
    except (ImportError, OSError, RuntimeError) as error:
        send(answers, {"problem": str(error), "kind": Problem.IMPORT})
        return
    try:
        model = _Model(Llama, setup)
    except Exception as error:  # noqa: BLE001 - whatever fails here is reported there
        send(answers, {"problem": str(error) or type(error).__name__, "kind": Problem.LOAD})
        return
    send(answers, {"n_tokens": 0})
    while (request := _receive_whole(requests)) is not None:
        if request:  # else a request to stop came after the end
            model.answer(request, requests, answers)


class _Model:
    """A loaded model, whose prompts are rendered already."""

    def __init__(self, llama_class: Any, setup: Mapping[str, Any]) -> None:
        use_rendered_prompts("rendered", lambda: self._prompt, lambda: str(setup["stop"]))
        self._prompt = ""
        self._llama = llama_class(
            setup["path"],
            n_ctx=setup["context"],
            n_threads=setup["threads"],
            n_threads_batch=setup["threads"],
            n_gpu_layers=setup["gpu_layers"],
            chat_format="rendered",
        )

    def answer(self, request: dict[str, Any], requests: IO[bytes], answers: IO[bytes]) -> None:
        """Write the pieces of an answer, until it ends or another message comes."""
        try:
            for piece in self._pieces(request):
                send(answers, {"piece": piece, "n_tokens": self._llama.n_tokens})
                if select.select([requests], [], [], 0)[0]:
                    break
        except Exception as error:  # noqa: BLE001 - whatever fails here is reported there
            problem = str(error) or type(error).__name__
            send(answers, {"problem": problem, "kind": Problem.ANSWER})
        else:
            send(answers, {"n_tokens": self._llama.n_tokens})

    def _pieces(self, request: dict[str, Any]) -> Iterator[str]:
        self._prompt = request.pop("prompt")
        if request.pop("is_chat"):
            for chunk in self._llama.create_chat_completion([], **request, stream=True):
                yield chunk["choices"][0]["delta"].get("content") or ""
        else:
            for chunk in self._llama.create_completion(self._prompt, **request, stream=True):
                yield chunk["choices"][0]["text"]


def _receive_whole(pipe: IO[bytes]) -> dict[str, Any] | None:
    """As `receive`, from a pipe without a buffer, so that `select` sees what is not read yet."""
    return receive(_Whole(pipe))


class _Whole:
    """Reads as many bytes as were asked for, where a pipe gives what is there."""

    def __init__(self, pipe: IO[bytes]) -> None:
        self._pipe = pipe

    def read(self, count: int) -> bytes:
        data = b""
        while len(data) < count and (piece := self._pipe.read(count - len(data))):
            data += piece
        return data
