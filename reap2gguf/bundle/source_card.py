"""Reads the front matter of a checkpoint's card, an untrusted file: short texts and lists of them.

Only the keys that a card or a GGUF header takes over are read. What cannot be used is ignored and
listed, so that it can be reported: bad front matter never stops a build.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from reap2gguf.messages import is_visible, shown

_MAX_BYTES = 2**17  # of front matter
_MOST_LETTERS = 500  # of a text
_MOST_ENTRIES = 100  # of a list
_FENCE = re.compile(r"---[ \t]*")
_ABSENT = frozenset({"", "~", "null", "Null", "NULL"})

# Every key with the names it has in cards; of several, the first one counts. The names with model_
# and the second names are llama.cpp's (`gguf-py/gguf/metadata.py`).
_TEXTS: Mapping[str, tuple[str, ...]] = {
    "license_name": ("license_name",),
    "license_link": ("license_link",),
    "pipeline_tag": ("pipeline_tag",),
    "name": ("name", "model_name"),
    "author": ("author", "model_author", "model_creator"),
    "version": ("version", "model_version"),
    "organization": ("organization", "model_organization"),
    "description": ("description", "model_description"),
    "finetune": ("finetune", "model_finetune"),
    "basename": ("basename", "model_basename", "model_type"),
    "size_label": ("size_label", "model_size_label"),
    "url": ("url", "model_url"),
    "doi": ("doi", "model_doi"),
    "uuid": ("uuid", "model_uuid"),
    "repo_url": ("repo_url", "model_repo_url"),
}
_LISTS: Mapping[str, tuple[str, ...]] = {
    "license": ("license",),
    "language": ("language", "languages"),
    "tags": ("tags",),
    "base_model": ("base_model", "base_models", "base_model_sources"),
    "datasets": ("datasets", "dataset", "dataset_sources"),
}


@dataclass(frozen=True)
class SourceCard:
    """What a card says in its front matter."""

    texts: Mapping[str, str] = field(default_factory=dict)
    lists: Mapping[str, Sequence[str]] = field(default_factory=dict)
    problems: tuple[str, ...] = ()  # what was ignored, one sentence each

    def list(self, key: str) -> list[str]:
        """The entries of a list; none if the card does not have it."""
        return [*self.lists.get(key, ())]


def read_card(path: Path) -> SourceCard:
    """The front matter of a card; empty if there is no card, or no front matter in it."""
    if not path.is_file():
        return SourceCard()
    try:
        with path.open("rb") as file:
            start = file.read(_MAX_BYTES + 1)
    except OSError as error:
        return _ignored(path, f"cannot be read ({error.strerror or error})")
    text = start.decode("utf-8-sig", errors="replace")
    first, *lines = text.splitlines() or [""]
    if not _FENCE.fullmatch(first):
        return SourceCard()
    end = next((i for i, line in enumerate(lines) if _FENCE.fullmatch(line)), None)
    if end is None:
        return _ignored(path, f"no second --- within {_MAX_BYTES:,} bytes")
    try:
        # the base loader makes a text of every scalar: `no` is a language, and 1.0 a version
        values = yaml.load("\n".join(lines[:end]).replace("\t", "  "), yaml.BaseLoader)
    except yaml.YAMLError as error:
        return _ignored(path, f"not YAML ({' '.join(str(error).split())[:200]})")
    except RecursionError:
        return _ignored(path, "nested too deep")
    if values is None or values == "":
        return SourceCard()
    if not isinstance(values, dict):
        return _ignored(path, f"{shown(values)}, expected keys and values")
    return _taken(path, values)


def _ignored(path: Path, reason: str) -> SourceCard:
    return SourceCard(problems=(f"{path}: front matter is ignored: {reason}",))


def _taken(path: Path, values: Mapping[str, Any]) -> SourceCard:
    texts: dict[str, str] = {}
    lists: dict[str, list[str]] = {}
    problems: list[str] = []

    def taken(key: str, value: Any) -> str:
        """A text, or "" if it is absent or cannot be used."""
        text = " ".join(value.split()) if isinstance(value, str) else value
        if text in _ABSENT if isinstance(text, str) else text is None:
            return ""
        if isinstance(text, str) and len(text) <= _MOST_LETTERS and is_visible(text):
            return text
        problems.append(
            f"{path}: {key} is {shown(value)}, expected a text of at most {_MOST_LETTERS} visible "
            "letters; ignored"
        )
        return ""

    for name, keys in _TEXTS.items():
        key = next((key for key in keys if key in values), None)
        if key is not None and (text := taken(key, values[key])):
            texts[name] = text
    for name, keys in _LISTS.items():
        key = next((key for key in keys if key in values), None)
        if key is None:
            continue
        entries = values[key] if isinstance(values[key], list) else [values[key]]
        if len(entries) > _MOST_ENTRIES:
            problems.append(
                f"{path}: {key} has {len(entries):,} entries, expected at most {_MOST_ENTRIES}; "
                "ignored"
            )
            continue
        if found := [text for entry in entries if (text := taken(key, entry))]:
            lists[name] = found
    return SourceCard(texts, lists, tuple(problems))
