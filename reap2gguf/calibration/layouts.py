"""Records become samples: a text, or a conversation with its tools.

Each dataset names its fields in its own way. `_LAYOUTS` is the table of the known layouts, in the
order in which they are tried. A record is recognised by its fields, wherever it is stored.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from reap2gguf.calibration.tool_calls import (
    SWE_AGENT_TOOLS,
    Message,
    Tool,
    callable_messages,
    function_schema,
    read_tools,
)
from reap2gguf.errors import CalibrationError
from reap2gguf.messages import shown

Record = Mapping[str, Any]

_EXPECTED = (
    "text, messages, prompt and completion, conversations, instruction and output or response, "
    "query and answers, answer or response, prompt and body, or question and choices"
)
_SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}


@dataclass(frozen=True)
class Sample:
    """A text that is used as it is, or messages for the model's chat template."""

    text: str | None = None
    messages: tuple[Message, ...] = ()
    tools: tuple[Tool, ...] | None = None


@dataclass(frozen=True)
class Layout:
    """Fields that a record must have, fields that it may have, and the function to read them."""

    needs: tuple[str, ...]
    read: Callable[[Record, str], Sample]
    may_have: tuple[str, ...] = ()

    def fits(self, record: Record) -> bool:
        return all(record.get(name) is not None for name in self.needs)


def read_record(record: Any, where: str) -> Sample:
    """The sample in a record. Raises CalibrationError if no layout fits it."""
    if not isinstance(record, dict):
        raise CalibrationError(f"{where}: a {type(record).__name__}, expected an object")
    for layout in _LAYOUTS:
        if layout.fits(record) and (layout.needs != ("text",) or isinstance(record["text"], str)):
            try:
                return layout.read(record, where)
            except RecursionError as error:
                raise CalibrationError(f"{where}: nested too deeply; flatten it") from error
    names = ", ".join(str(name)[:80] for name in list(record)[:8]) or "no fields"
    raise CalibrationError(f"{where}: has {names}, expected {_EXPECTED}")


def columns(names: list[str]) -> list[str]:
    """The columns of a dataset that its samples are made of; all columns if no layout fits."""
    record = dict.fromkeys(names, "")
    if not any(layout.fits(record) for layout in _LAYOUTS):
        return names
    return [name for name in names if name in _ALL_FIELDS]


def _read_text(record: Record, where: str) -> Sample:
    return Sample(text=str(record["text"]))


def _read_messages(record: Record, where: str) -> Sample:
    """`messages` as a list, as JSON text (SWE-smith), or as one text by the user."""
    value = record["messages"]
    stored = _json_list(value)
    if stored is None:
        messages = _messages(value, "user", where)
    else:
        messages = [_flat_content(m) for m in _messages(stored, "user", where)]
    tools = read_tools(record.get("tools"), where)
    if tools is None and _is_trajectory(record) and any(m.get("tool_calls") for m in messages):
        tools = SWE_AGENT_TOOLS
    return Sample(messages=callable_messages(messages), tools=tools)


def _is_trajectory(record: Record) -> bool:
    """Whether a record is one of SWE-smith's, which do not list their tools."""
    return record.get("traj_id") is not None or record.get("instance_id") is not None


def _read_completion(record: Record, where: str) -> Sample:
    messages = _messages(record["prompt"], "user", where)
    messages += _messages(record["completion"], "assistant", where)
    return Sample(
        messages=callable_messages(messages), tools=read_tools(record.get("tools"), where)
    )


def _read_conversations(record: Record, where: str) -> Sample:
    """ShareGPT: turns of `from` and `value`; or messages under that name."""
    turns = record["conversations"]
    if not isinstance(turns, list) or not turns or not all(isinstance(t, dict) for t in turns):
        raise CalibrationError(f"{where}: expected conversations as a list of turns")
    if "role" in turns[0]:
        return _read_messages({**record, "messages": turns}, where)
    messages: list[Message] = []
    if isinstance(record.get("system"), str) and record["system"]:
        messages.append({"role": "system", "content": record["system"]})
    for turn in turns:
        role = _SHAREGPT_ROLES.get(str(turn.get("from")))
        if role is None or not isinstance(turn.get("value"), str):
            raise CalibrationError(
                f"{where}: a turn from {shown(turn.get('from'))}, expected from (one of "
                f"{', '.join(_SHAREGPT_ROLES)}) and value (text) in each turn"
            )
        messages.append({"role": role, "content": turn["value"]})
    return Sample(messages=tuple(messages), tools=read_tools(record.get("tools"), where))


def _pair(question_field: str, answer_field: str) -> Callable[[Record, str], Sample]:
    """Reads a question and its answer from two fields."""

    def read(record: Record, where: str) -> Sample:
        question = _string(record, question_field, where)
        more = next((record[n] for n in ("input", "context") if _is_text(record.get(n))), "")
        if question_field == "instruction" and more:
            question = f"{question}\n\n{more}"
        return _exchange(question, _string(record, answer_field, where))

    return read


def _read_story(record: Record, where: str) -> Sample:
    prompt = _string(record, "prompt", where)
    return _exchange(f"Write a story on this prompt:\n\n{prompt}", _string(record, "body", where))


def _read_choices(record: Record, where: str) -> Sample:
    """MMLU: a question and the choices for its answer; REAP reads only the question."""
    choices = record["choices"]
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise CalibrationError(f"{where}: expected choices as a list of texts")
    lines = [f"{chr(ord('A') + n % 26)}. {choice}" for n, choice in enumerate(choices)]
    question = _string(record, "question", where)
    return Sample(messages=({"role": "user", "content": "\n".join([question, *lines])},))


def _read_calls(record: Record, where: str) -> Sample:
    """xlam: a query, and as JSON text the tools and the calls that answer it."""
    calls = record["answers"]
    calls = _json_list(calls) if isinstance(calls, str) else calls
    good = isinstance(calls, list) and all(
        isinstance(call, dict) and isinstance(call.get("name"), str) and "arguments" in call
        for call in calls
    )
    if not good:
        raise CalibrationError(f"{where}: expected answers as a list of calls with name, arguments")
    assert calls is not None
    asked = {"role": "user", "content": _string(record, "query", where)}
    functions = [{"function": call} for call in calls]
    called = {"role": "assistant", "content": "", "tool_calls": functions}
    tools = read_tools(record.get("tools"), where)
    schemas = tuple(function_schema(tool) for tool in tools) if tools else None
    return Sample(messages=callable_messages([asked, called]), tools=schemas)


_LAYOUTS = (
    Layout(("text",), _read_text),
    Layout(("messages",), _read_messages, ("tools", "instance_id", "traj_id")),
    Layout(("prompt", "completion"), _read_completion, ("tools",)),
    Layout(("conversations",), _read_conversations, ("tools", "system")),
    Layout(("query", "answers"), _read_calls, ("tools",)),
    Layout(("query", "answer"), _pair("query", "answer")),
    Layout(("query", "response"), _pair("query", "response")),
    Layout(("instruction", "output"), _pair("instruction", "output"), ("input", "context")),
    Layout(("instruction", "response"), _pair("instruction", "response"), ("input", "context")),
    Layout(("prompt", "body"), _read_story),
    Layout(("question", "choices"), _read_choices),
)
_ALL_FIELDS = {name for layout in _LAYOUTS for name in (*layout.needs, *layout.may_have)}


def _exchange(question: str, answer: str) -> Sample:
    return Sample(
        messages=(
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        )
    )


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _string(record: Record, name: str, where: str) -> str:
    if not isinstance(record[name], str):
        raise CalibrationError(f"{where}: {name} is {shown(record[name])}, expected text")
    return str(record[name])


def _json_list(value: Any) -> list[Any] | None:
    """The list in a JSON text; None if the text is not a JSON list."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return None
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, list) else None


def _messages(value: Any, role: str, where: str) -> list[Message]:
    """Messages as given; a plain string becomes one message of `role`."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    good = isinstance(value, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and "content" in m for m in value
    )
    if not good or not value:
        raise CalibrationError(f"{where}: expected messages with a role and content each")
    return list(value)


def _flat_content(message: Message) -> Message:
    """The parts of SWE-smith's messages for the model: role, content as one text, tool calls."""
    content = message["content"]
    parts = content if isinstance(content, list) else [content]
    texts = [_part_text(part) for part in parts if part is not None]
    flat = {"role": message["role"], "content": "\n".join(text for text in texts if text)}
    return {**flat, "tool_calls": message["tool_calls"]} if message.get("tool_calls") else flat


def _part_text(part: Any) -> str:
    if isinstance(part, dict) and isinstance(part.get("text"), str):
        return str(part["text"])
    return part if isinstance(part, str) else json.dumps(part, sort_keys=True)
