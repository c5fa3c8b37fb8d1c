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

from reap2gguf.errors import BadSampleError
from reap2gguf.messages import shown

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


def callable_messages(messages: Sequence[Message], where: str) -> tuple[Message, ...]:
    """Messages with their tool calls in the form of templates; other messages are unchanged.

    Raises BadSampleError for a call without a name, or with arguments that are not an object.
    """
    result: list[Message] = []
    count = 0
    for message in messages:
        calls = message.get("tool_calls")
        if isinstance(calls, str):
            calls = _parsed(calls, f"{where}: tool_calls")
        if calls and not isinstance(calls, list):
            raise BadSampleError(f"{where}: tool_calls is {shown(calls)}, expected a list of calls")
        if calls:
            numbered = [_call(call, count + n, where) for n, call in enumerate(calls)]
            message = {**message, "tool_calls": numbered}
            count += len(calls)
        result.append(message)
    return tuple(result)


def _call(call: Any, number: int, where: str) -> Tool:
    """A call with its arguments as an object, a type and an id."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadSampleError(f"{where}: a tool call is {shown(call)}, expected a function's name")
    named = f"{where}: the arguments of {shown(function['name'])}"
    arguments = _arguments(function.get("arguments"), named)
    plain = {"name": function["name"], "arguments": arguments}
    return {"id": call.get("id") or f"call{number:05d}", "type": "function", "function": plain}


def _arguments(value: Any, where: str) -> dict[str, Any]:
    """Arguments as an object, from an object or JSON text; {} where there are none."""
    for _ in range(2):  # some datasets store JSON text inside JSON text
        value = _parsed(value, where) if isinstance(value, str) else value
    if not isinstance(value, dict | None):
        raise BadSampleError(f"{where} are {shown(value)}, expected a JSON object")
    return value or {}


def _parsed(text: str, where: str) -> Any:
    """The value of a JSON text; None for an empty one."""
    try:
        return json.loads(text) if text.strip() else None
    except (ValueError, RecursionError) as error:
        raise BadSampleError(f"{where} are not JSON ({error})") from error


def read_tools(value: Any, where: str) -> tuple[Tool, ...] | None:
    """The JSON schemas of a sample's tools, from a list or JSON text; None where it has none.

    A function that is listed bare, as LLaMA-Factory and OpenAI's old `functions` do, is wrapped.
    Raises BadSampleError for anything else.
    """
    if isinstance(value, str):
        value = _parsed(value, f"{where}: tools")
    if not value:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise BadSampleError(f"{where}: expected tools as a list of JSON schemas")
    return tuple(function_schema(tool) if _is_bare(tool) else tool for tool in value)


def _is_bare(tool: Tool) -> bool:
    """Whether a tool is a function without {"type": "function", "function": ...} around it."""
    return isinstance(tool.get("name"), str) and not isinstance(tool.get("function"), Mapping)


def function_schema(tool: Tool) -> Tool:
    """A tool of xlam, which lists its parameters by name, as a function with a JSON schema."""
    if tool.get("function"):
        return tool
    # OpenAI's newer form has the type beside the name; stored tables fill absent fields with null
    tool = {k: v for k, v in tool.items() if k != "function" and (k, v) != ("type", "function")}
    if "input_schema" in tool and not tool.get("parameters"):  # Anthropic's name
        tool["parameters"] = tool.pop("input_schema")
    stored = tool.get("parameters")
    is_schema = isinstance(stored, dict) and (
        isinstance(stored.get("properties"), dict) or stored.get("type") == "object" or not stored
    )
    if not isinstance(stored, dict) or is_schema:
        return {"type": "function", "function": tool}
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
