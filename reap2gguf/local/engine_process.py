"""The process that runs a model for `chat`; `engine.py` starts it.

It loads the model of the first message and answers each later one, piece by piece. An empty message
stops an answer. `frames.py` reads and writes messages.

Nothing here may load the package's own libggml: llama_cpp contains one of the same name and fails
if the other was loaded first.
"""

from __future__ import annotations

import select
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Any

from reap2gguf.local.frames import Problem, own_pipes, receive_whole, send


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
    requests, answers = own_pipes()
    setup = receive_whole(requests)
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
    while (request := receive_whole(requests)) is not None:
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
