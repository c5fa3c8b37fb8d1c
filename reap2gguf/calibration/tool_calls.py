"""Tools and calls of them, as chat templates read them.

They become what a server would hand to the template, since some templates read no other form. Tools
are {"type": "function", "function": {name, description, parameters}} with parameters as a JSON
schema; calls have arguments as an object, and ids of nine letters and digits, counted, where the
data set has none. REAP hands on xlam's tools flat as they are stored, and draws ids by lot.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from reap2gguf.errors import CalibrationError

Message = Mapping[str, Any]
Tool = Mapping[str, Any]

_JSON_TYPES = {
    "str": "string", "int": "integer", "float": "number", "bool": "boolean", "list": "array",
    "tuple": "array", "set": "array", "dict": "object",
}  # fmt: skip


def callable_messages(messages: Sequence[Message]) -> tuple[Message, ...]:
    """Messages whose calls of tools are as templates take them; others as they are."""
    found: list[Message] = []
    count = 0
    for message in messages:
        calls = message.get("tool_calls")
        if isinstance(calls, list) and calls:
            numbered = [_call(call, count + n) for n, call in enumerate(calls)]
            message = {**message, "tool_calls": numbered}
            count += len(calls)
        found.append(message)
    return tuple(found)


def _call(call: Any, number: int) -> Any:
    """A call with arguments as an object, a type, and an id; what is no call stays."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        return call
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            parsed = json.loads(arguments)
        except (ValueError, RecursionError):
            parsed = None  # a model may have written no JSON; templates take the text as well
        arguments = parsed if isinstance(parsed, dict) else arguments
    said = {"name": function.get("name"), "arguments": arguments}
    return {"id": call.get("id") or f"call{number:05d}", "type": "function", "function": said}


def read_tools(value: Any, where: str) -> tuple[Tool, ...] | None:
    """The JSON schemas of a sample's tools, as a list or as JSON text; None where it has none."""
    if isinstance(value, str):
        try:
            value = json.loads(value or "null")
        except (ValueError, RecursionError) as error:
            raise CalibrationError(f"{where}: tools are not JSON ({error})") from error
    if not value:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise CalibrationError(f"{where}: expected tools as a list of JSON schemas")
    return tuple(value)


def described(tool: Tool) -> Tool:
    """One of xlam's tools, whose parameters are by name, as a function with a JSON schema."""
    if "function" in tool:
        return tool
    stored = tool.get("parameters")
    if not isinstance(stored, dict) or isinstance(stored.get("properties"), dict):
        return {"type": "function", "function": dict(tool)}
    properties = {name: _property(value) for name, value in stored.items()}
    required = [name for name, value in stored.items() if not _is_optional(value)]
    schema = {"type": "object", "properties": properties, "required": required}
    return {"type": "function", "function": {**tool, "parameters": schema}}


def _is_optional(parameter: Any) -> bool:
    kind = parameter.get("type") if isinstance(parameter, dict) else None
    return isinstance(kind, str) and "optional" in kind


def _property(parameter: Any) -> Any:
    """A parameter whose type is Python's, such as "List[int], optional", with JSON's."""
    if not isinstance(parameter, dict) or not isinstance(parameter.get("type"), str):
        return parameter
    word = parameter["type"].partition(",")[0].strip()
    kind = _JSON_TYPES.get(word.partition("[")[0].lower(), word)
    return {**parameter, "type": kind}
