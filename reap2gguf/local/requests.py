"""What an OpenAI-style request may hold: typed and bounded before llama.cpp sees it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from reap2gguf.messages import shown

MAX_BODY_BYTES = 8 * 2**20
_MAX_MESSAGES = 10_000
_MAX_STOPS = 16
_ROLES = ("system", "developer", "user", "assistant", "tool")
# settings that are passed on, and the values that they may have
_NUMBERS = {
    "temperature": (0.0, 10.0), "top_p": (0.0, 1.0), "min_p": (0.0, 1.0),
    "presence_penalty": (-2.0, 2.0), "frequency_penalty": (-2.0, 2.0),
    "repeat_penalty": (0.0, 10.0),
}  # fmt: skip
_INTEGERS = {"top_k": (0, 2**31 - 1), "seed": (-(2**31), 2**32 - 1), "max_tokens": (1, 2**31 - 1)}

_NOT_HERE = ("tools", "functions", "logprobs", "logit_bias")


class RequestError(Exception):
    """A request that is answered by an error: its HTTP status, and OpenAI's code."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


def read_body(data: bytes) -> dict[str, Any]:
    """The JSON object of a request; RequestError if it is none."""
    try:
        values = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise RequestError(400, f"the body is not valid JSON ({error})", "invalid_json") from error
    if not isinstance(values, dict):
        raise RequestError(400, "the body is no JSON object", "invalid_json")
    return values


def settings_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings for llama-cpp-python; unknown fields are ignored, null is as if left out.

    What would change the answer and is not implemented is refused: RequestError.
    """
    found: dict[str, Any] = {}
    for name, (low, high) in {**_NUMBERS, **_INTEGERS}.items():
        value = values.get(name)
        if name == "max_tokens" and value is None:
            value = values.get("max_completion_tokens")  # OpenAI's newer name
        if value is None:
            continue
        wanted = (int,) if name in _INTEGERS else (int, float)
        if type(value) not in wanted or not low <= value <= high:
            kind = "an integer" if name in _INTEGERS else "a number"
            raise _wrong(name, value, f"{kind} from {low} to {high}")
        found[name] = value
    if (stop := values.get("stop")) is not None:
        found["stop"] = _stops(stop)
    if (form := values.get("response_format")) is not None:
        found["response_format"] = _format(form)
    if values.get("n") not in (None, 1):
        raise _wrong("n", values["n"], "1")
    for name in _NOT_HERE:
        if values.get(name):
            raise _wrong(name, values[name], "nothing: here they are not; llama-server has them")
    return found


def wants_stream(values: Mapping[str, Any]) -> bool:
    """Whether the answer is to come piece by piece."""
    stream = values.get("stream")
    if stream is not None and not isinstance(stream, bool):
        raise _wrong("stream", stream, "true or false")
    return bool(stream)


def wants_usage(values: Mapping[str, Any]) -> bool:
    """Whether a streamed answer is to end with its numbers of tokens."""
    options = values.get("stream_options")
    if options is not None and not isinstance(options, dict):
        raise _wrong("stream_options", options, "an object")
    return options is not None and options.get("include_usage") is True


def messages_of(values: Mapping[str, Any]) -> list[dict[str, str]]:
    """The messages of a chat, each with plain text."""
    messages = values.get("messages")
    if not isinstance(messages, list) or not 1 <= len(messages) <= _MAX_MESSAGES:
        raise _wrong("messages", messages, "a list of messages")
    return [_message(message, number) for number, message in enumerate(messages)]


def prompt_of(values: Mapping[str, Any]) -> str:
    """The text that a completion goes on with."""
    prompt = values.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]
    if not isinstance(prompt, str):
        raise _wrong("prompt", prompt, "a text")
    return _whole(prompt, "prompt")


def _message(message: Any, number: int) -> dict[str, str]:
    where = f"messages[{number}]"
    if not isinstance(message, dict):
        raise _wrong(where, message, "an object with role and content")
    role, content = message.get("role"), message.get("content")
    if role not in _ROLES:
        raise _wrong(f"{where}.role", role, f"one of {', '.join(_ROLES)}")
    if isinstance(content, list):
        content = "".join(_text_part(part, where) for part in content)
    if content is None and role == "assistant":
        content = ""
    if not isinstance(content, str):
        raise _wrong(f"{where}.content", content, "a text")
    # templates know OpenAI's newer name of a system message by its old one
    role = "system" if role == "developer" else role
    return {"role": role, "content": _whole(content, f"{where}.content")}


def _text_part(part: Any, where: str) -> str:
    text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
    if not isinstance(text, str):
        raise _wrong(f"{where}.content", part, "parts of type text (this server sees no images)")
    return text


def _stops(stop: Any) -> list[str]:
    stops = [stop] if isinstance(stop, str) else stop
    if (
        not isinstance(stops, list) or len(stops) > _MAX_STOPS
        or not all(isinstance(text, str) and text for text in stops)
    ):  # fmt: skip
        raise _wrong("stop", stop, f"a text, or a list of at most {_MAX_STOPS}")
    return [_whole(text, "stop") for text in stops]


def _format(form: Any) -> dict[str, Any]:
    kind = form.get("type") if isinstance(form, dict) else None
    if kind not in ("text", "json_object"):
        raise _wrong("response_format", form, 'an object of type "text" or "json_object"')
    return {"type": kind}


def _whole(text: str, name: str) -> str:
    """Text that UTF-8 can hold: JSON may spell half a character."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _wrong(name, text, "text without half characters (surrogates)") from error
    return text


def _wrong(name: str, value: Any, expected: str) -> RequestError:
    return RequestError(400, f"{name} is {shown(value)}, expected {expected}", "invalid_value")
