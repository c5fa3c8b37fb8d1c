"""Messages of a conversation as datasets store them, in the one form that chat templates read.

A message has a role, content and perhaps tool calls. Datasets spell the same role in several ways,
leave out the content of a message that only calls tools, or store content as a list of parts.
Templates of text models read only text: where content is a list, such a template prints nothing
and reports nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from reap2gguf.errors import BadSampleError, CalibrationError
from reap2gguf.messages import shown

if TYPE_CHECKING:
    from reap2gguf.calibration.tool_calls import Message

# turns of the assistant whose text is calls as JSON: LLaMA-Factory's name and ms-swift's
_CALLING = ("function_call", "tool_call")
# the names of roles in published datasets, in small letters
_ROLES = {
    **dict.fromkeys(("system",), "system"),
    **dict.fromkeys(("developer",), "developer"),
    **dict.fromkeys(("human", "user", "prompter"), "user"),
    **dict.fromkeys(
        ("gpt", "assistant", "chatgpt", "bot", "model", "ai", "bing", "bard"),
        "assistant",
    ),
    **dict.fromkeys(_CALLING, "assistant"),
    **dict.fromkeys(
        ("tool", "observation", "function", "function_response", "tool_response"), "tool"
    ),
}
_TEXT_PARTS = ("text", "input_text", "output_text")
_MEDIA_PARTS = (
    *("image", "image_url", "input_image", "video", "video_url", "input_video"),
    *("audio", "audio_url", "input_audio"),
)
_OF_PARTS = {"type", "text", *_MEDIA_PARTS}
REASONING = ("reasoning_content", "thinking", "reasoning")
_OF_TURNS = (*REASONING, "tool_calls", "function_call")


def read_messages(value: Any, role: str, where: str) -> list[Message]:
    """Messages in the form of templates; a text becomes one message of `role`.

    `value` is a text or a list of messages: `role` and `content`, or ShareGPT's `from` and `value`,
    or one name of each. A turn of LLaMA-Factory's `function_call` becomes tool calls.
    Raises BadSampleError for a message without content, and CalibrationError for a role or a kind
    of content that is not known.
    """
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if not isinstance(value, list) or not value:
        raise BadSampleError(
            f"{where}: expected messages with a role and content each, found {shown(value)}"
        )
    messages = (_message(turn, where) for turn in value)
    return [message for message in messages if message is not None]


def _message(turn: Any, where: str) -> Message | None:
    """One message; None for a system message without content."""
    is_turn = isinstance(turn, dict) and turn.get("role") is None and "from" in turn
    given = turn.get("from" if is_turn else "role") if isinstance(turn, dict) else None
    if not isinstance(given, str):
        raise BadSampleError(
            f"{where}: expected messages with a role and content each, found {shown(turn)}"
        )
    role = _ROLES.get(given.strip().lower())
    if role is None and is_turn:
        raise CalibrationError(
            f"{where}: a turn from {shown(given)}, expected one of {', '.join(_ROLES)}"
        )
    message = {key: turn[key] for key in _OF_TURNS if turn.get(key)} if is_turn else {**turn}
    # templates may know roles of their own, so others are left as they are
    message["role"] = role or given
    names = ("value", "content") if is_turn else ("content", "value")
    content = next((turn[name] for name in names if turn.get(name) is not None), None)
    message["content"] = content
    if not message.get("tool_calls"):
        _move_calls(message, given.strip().lower() in _CALLING, where)
        content = message["content"]
    if role == "assistant":
        _name_reasoning(message)
    if content is None and role in ("system", "developer"):
        return None
    message["content"] = _content(content, message, where)
    return message


def _move_calls(message: dict[str, Any], is_calling: bool, where: str) -> None:
    """Write calls that are in `function_call`, or are the text of the turn, as tool calls."""
    call = message.get("function_call")
    if isinstance(call, str) and call.strip():
        call = _json_of(call, f"{where}: function_call")
    if call:
        message.pop("function_call")
        message["tool_calls"] = [{"function": call}]
        return
    content = message["content"]
    if not is_calling or not content:
        return
    if isinstance(content, str) and content.lstrip().startswith(("{", "[")):
        content = _json_of(content, f"{where}: a turn of calls")
    if isinstance(content, dict) and "type" not in content:
        content = [content]
    # another text is in a form of the model's own, and stays as it is
    if isinstance(content, list) and all(isinstance(c, dict) and "type" not in c for c in content):
        message["tool_calls"] = [{"function": call} for call in content]
        message["content"] = ""


def _json_of(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadSampleError(f"{where} is not JSON ({error})") from error


def _name_reasoning(message: dict[str, Any]) -> None:
    """Give reasoning the name that templates of Qwen read, beside its own."""
    texts = (message.get(key) for key in REASONING)
    text = next((text for text in texts if isinstance(text, str) and text.strip()), None)
    if text is not None:
        message["reasoning_content"] = text


def _content(content: Any, message: Message, where: str) -> str | list[Any]:
    """Content as text, or as a list of parts that are all known; null is the same as absent."""
    if isinstance(content, str):
        return content
    if content is None:
        has_more = message.get("tool_calls") or any(message.get(key) for key in REASONING)
        if message["role"] != "tool" and not has_more:
            raise BadSampleError(f"{where}: a message of {shown(message['role'])} has no content")
        return ""
    if isinstance(content, dict) and message["role"] == "tool" and not content.keys() & _OF_PARTS:
        return json.dumps(content, ensure_ascii=False)  # what a tool returned, as servers write it
    parts = [content] if isinstance(content, dict) else content
    if not isinstance(parts, list):
        raise BadSampleError(
            f"{where}: content is {shown(content)}, expected text or a list of parts"
        )
    return [_part(part, where) for part in parts if part is not None]


def _part(part: Any, where: str) -> Mapping[str, Any]:
    """A part with the type that templates know: text, or an image, video or sound as stored."""
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not isinstance(part, dict):
        raise BadSampleError(f"{where}: a part of content is {shown(part)}, expected an object")
    kind = part.get("type") or _kind_of(part)
    if kind in _TEXT_PARTS and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if kind in _TEXT_PARTS:
        raise BadSampleError(f"{where}: a part of content has no text: {shown(part)}")
    if kind in _MEDIA_PARTS:
        return {**part, "type": kind}
    expected = ", ".join((*_TEXT_PARTS, *_MEDIA_PARTS))
    raise CalibrationError(
        f"{where}: a part of content has the type {shown(kind)}, expected one of {expected}"
    )


def _kind_of(part: Mapping[str, Any]) -> str:
    """The type of a part that does not name it."""
    return next((kind for kind in _MEDIA_PARTS if part.get(kind) is not None), "text")


def has_parts(messages: Sequence[Message]) -> bool:
    """Whether the content of a message is a list of parts."""
    return any(isinstance(message["content"], list) for message in messages)


def joined_parts(
    messages: Sequence[Message], template_reads_parts: bool
) -> tuple[list[Message], int]:
    """Messages with text parts joined, and the number of images and the like that were dropped.

    A list remains only where it holds an image and the template reads lists. Such templates put
    nothing between two texts; servers put a line break there for all other templates.
    """
    result: list[Message] = []
    n_dropped = 0
    for message in messages:
        content = message["content"]
        if isinstance(content, list):
            texts = [part["text"] for part in content if part["type"] == "text"]
            n_others = len(content) - len(texts)
            if not (n_others and template_reads_parts):
                n_dropped += n_others
                content = ("" if template_reads_parts else "\n").join(texts)
        result.append({**message, "content": content})
    return result, n_dropped


def text_of(content: str | list[Any]) -> str:
    """The text of a message's content, without images."""
    if isinstance(content, str):
        return content
    texts = (part["text"] for part in content if part["type"] == "text")
    return "\n".join(text for text in texts if text)


def flat_message(message: Message) -> Message:
    """What the model reads of SWE-smith's messages: role, content as one text, tool calls."""
    content = text_of(message["content"])
    flat = {"role": message["role"], "content": content}
    return {**flat, "tool_calls": message["tool_calls"]} if message.get("tool_calls") else flat


def json_list(value: Any, name: str, where: str) -> list[Any] | None:
    """The list in a JSON text; None for another value. BadSampleError for a broken list."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return None
    try:
        found = json.loads(value)
    except (ValueError, RecursionError) as error:
        if value.replace(" ", "").startswith("[{"):
            raise BadSampleError(f"{where}: {name} are not JSON ({error})") from error
        return None  # a text that begins with a bracket
    return found if isinstance(found, list) else None
