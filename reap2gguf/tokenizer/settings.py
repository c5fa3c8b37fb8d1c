"""Compares the settings of one part of a `tokenizer.json` with the values that are known."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reap2gguf.errors import UnsupportedModelError
from reap2gguf.messages import shown
from reap2gguf.tokenizer.advice import HELP

# of a ByteLevel step after splitting, and for texts made of ids, nothing of these changes an id
BYTE_LEVEL_AFTER = dict.fromkeys(
    ("add_prefix_space", "trim_offsets", "use_regex"), (True, False, None)
)
Allowed = Mapping[str, tuple[Any, ...]]  # a setting and the values it may have; missing is None


def check_settings(part: Any, allowed: Allowed, kind: str, where: Path, name: str) -> None:
    """Refuse a part of another type, with a setting that is not known, or with another value.

    `name` is where the part stands in the file `where`. Raises UnsupportedModelError.
    """
    if not isinstance(part, dict) or part.get("type") != kind:
        found = part.get("type") if isinstance(part, dict) else part
        raise unknown(where, name, found, kind)
    for key in sorted({*part, *allowed} - {"type"}):
        values, value = allowed.get(key), part.get(key)
        if values is None:
            raise unknown(where, f"{name}.{key}", value, "no such setting")
        if not any(
            value == good and isinstance(value, bool) == isinstance(good, bool) for good in values
        ):
            raise unknown(where, f"{name}.{key}", value, " or ".join(map(shown, values)))


def unknown(where: Path, name: str, found: Any, expected: str) -> UnsupportedModelError:
    """The error for a part `name` of a file, with what was found and expected there."""
    return UnsupportedModelError(f"{where}: {name} is {shown(found)}, expected {expected}; {HELP}")
