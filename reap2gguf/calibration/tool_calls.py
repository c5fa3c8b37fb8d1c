"""Tools and tool calls in the form that chat templates read.

They get the form that a server passes to the template, since some templates read no other. A tool
is {"type": "function", "function": {name, description, parameters}} with parameters as a JSON
schema. A call has its arguments as an object and, where the dataset has no id, one of nine letters
and digits that counts up. REAP passes xlam's tools on flat as they are stored, and draws ids
at random.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from reap2gguf.errors import CalibrationError

Message = Mapping[str, Any]
Tool = Mapping[str, Any]

_JSON_TYPES = {
    "str": "string",
    "int": "integer",
    "float": "number",
    "bool": "boolean",
    "list": "array",
    "tuple": "array",
    "set": "array",
    "dict": "object",
}


def callable_messages(messages: Sequence[Message]) -> tuple[Message, ...]:
    """Messages with their tool calls in the form of templates; other messages are unchanged."""
    result: list[Message] = []
    count = 0
    for message in messages:
        calls = message.get("tool_calls")
        if isinstance(calls, list) and calls:
            numbered = [_call(call, count + n) for n, call in enumerate(calls)]
            message = {**message, "tool_calls": numbered}
            count += len(calls)
        result.append(message)
    return tuple(result)


def _call(call: Any, number: int) -> Any:
    """A call with arguments as an object, a type and an id; any other value is unchanged."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        return call
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            parsed = json.loads(arguments)
        except (ValueError, RecursionError):
            parsed = None  # a model may write broken JSON; templates accept text as well
        arguments = parsed if isinstance(parsed, dict) else arguments
    plain = {"name": function.get("name"), "arguments": arguments}
    return {"id": call.get("id") or f"call{number:05d}", "type": "function", "function": plain}


def read_tools(value: Any, where: str) -> tuple[Tool, ...] | None:
    """The JSON schemas of a sample's tools, from a list or JSON text; None where it has none.

    Raises CalibrationError for anything else.
    """
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


def function_schema(tool: Tool) -> Tool:
    """A tool of xlam, which lists its parameters by name, as a function with a JSON schema."""
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
    python_type = parameter.get("type") if isinstance(parameter, dict) else None
    return isinstance(python_type, str) and "optional" in python_type


def _property(parameter: Any) -> Any:
    """A parameter with a Python type, such as "List[int], optional", with the JSON type instead."""
    if not isinstance(parameter, dict) or not isinstance(parameter.get("type"), str):
        return parameter
    word = parameter["type"].partition(",")[0].strip()
    return {**parameter, "type": _JSON_TYPES.get(word.partition("[")[0].lower(), word)}


def _function(
    name: str, description: str, required: tuple[str, ...] = (), **properties: Any
) -> dict[str, Any]:
    """The schema of a tool."""
    parameters = {"type": "object", "properties": properties, "required": list(required)}
    function = {"name": name, "description": description, "parameters": parameters}
    return {"type": "function", "function": function}


def _text(description: str, **more: Any) -> dict[str, Any]:
    return {"type": "string", "description": description, **more}


_EDITOR_COMMANDS = ["view", "create", "str_replace", "insert", "undo_edit"]

# The tools that SWE-agent had when SWE-smith's trajectories were recorded: the trajectories hold
# calls of them and no schemas. Names and parameters are SWE-agent's, the descriptions our own.
SWE_AGENT_TOOLS: tuple[Mapping[str, Any], ...] = (
    _function(
        "str_replace_editor",
        "Look at files and folders, write new files, and change text in files. Edits stay from one "
        "call to the next.",
        ("command", "path"),
        command=_text("What to do.", enum=_EDITOR_COMMANDS),
        path=_text("The file or folder, as an absolute path."),
        file_text=_text("For create: what the new file holds."),
        old_str=_text("For str_replace: the text to replace, which occurs once in the file."),
        new_str=_text("For str_replace and insert: the text to put there."),
        insert_line={
            "type": "integer",
            "description": "For insert: the line after which the text goes.",
        },
        view_range={
            "type": "array",
            "description": "For view: the first and last line to show; -1 is the end of the file.",
            "items": {"type": "integer"},
        },
    ),
    _function("_state_anthropic", "Keep the state of the editor between calls."),
    _function("submit", "Hand in the work as it is now."),
    _function(
        "bash",
        "Run a command in a shell and get what it prints.",
        ("command",),
        command=_text("The command line."),
    ),
)
