"""A hash of what a task asks and how answers are judged: scores of another one do not compare."""

from __future__ import annotations

import hashlib
import json
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from reap2gguf.evaluating.tasks.loading import Loaded, Task

# where the questions and the file come from; the questions themselves are hashed
_PLACES = ("dataset_path", "dataset_name", "dataset_kwargs", "custom_dataset", "metadata")
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")  # of a function without source


def definitions_of(loaded: Loaded) -> dict[str, str]:
    """A hash for each task, whose questions are built, and for each group of its members'.

    The same files and data give the same hashes on every machine.
    """
    found = {name: _of_task(task) for name, task in loaded.tasks.items()}

    def of_group(name: str) -> str:
        members = {
            one: found[one] if one in loaded.tasks else of_group(one)
            for one in loaded.members.get(name, ())
        }
        found[name] = _hash(_settings(loaded.groups[name].to_dict()), members)
        return found[name]

    for name in loaded.groups:
        of_group(name)
    return found


def _of_task(task: Task) -> str:
    asked = [(one.request_type, one.args, one.doc) for one in task.instances]
    return _hash(type(task).__qualname__, _settings(task.dump_config()), asked)


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a file says, and its version, without where it lies."""
    version = (config.get("metadata") or {}).get("version")
    return {"version": version} | {k: v for k, v in config.items() if k not in _PLACES}


def _hash(*values: Any) -> str:
    text = json.dumps(values, sort_keys=True, default=_plain)
    return hashlib.sha256(_ADDRESS.sub("", text).encode()).hexdigest()[:32]


def _plain(value: Any) -> Any:
    """Arrays and dates of a data set, and functions, as texts."""
    return value.tolist() if hasattr(value, "tolist") else str(value)
