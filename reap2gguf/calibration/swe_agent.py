"""The tools that SWE-agent had when SWE-smith's trajectories were recorded.

The trajectories hold calls of them and no schemas. Names and parameters are SWE-agent's, the words
are not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def _function(
    name: str, description: str, required: tuple[str, ...] = (), **properties: Any
) -> dict[str, Any]:
    """A tool's schema as chat templates take it."""
    parameters = {"type": "object", "properties": properties, "required": list(required)}
    function = {"name": name, "description": description, "parameters": parameters}
    return {"type": "function", "function": function}


def _text(description: str, **more: Any) -> dict[str, Any]:
    return {"type": "string", "description": description, **more}


_EDITOR_COMMANDS = ["view", "create", "str_replace", "insert", "undo_edit"]

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
