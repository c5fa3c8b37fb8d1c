"""The GGUF file, here or on the Hub, that the user named as MODEL."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from reap2gguf.files import is_gguf
from reap2gguf.gguf_files.part_names import parse_part_name
from reap2gguf.gguf_files.split import read_whole_header
from reap2gguf.gguf_source.folder import MadeFolder
from reap2gguf.hub.gguf_file import HubGgufHeader, hub_gguf_name, open_hub_gguf
from reap2gguf.hub.retry import Note, ignore_note
from reap2gguf.models.from_gguf import GgufModel, model_from_gguf
from reap2gguf.quantizing.labels import hub_label

if TYPE_CHECKING:
    from reap2gguf.gguf_files.reader import GgufHeader
    from reap2gguf.models.contract import MoeModel

_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class GgufFile:
    """A GGUF file of a model, or all its parts: the header, and what is made of it."""

    header: GgufHeader
    found: GgufModel
    made: MadeFolder  # its config and, once made, its tokenizer
    name: str  # FILE.gguf, or owner/name:FILE.gguf
    label: str  # of the model: owner/name, or the file's name without its type
    commit: str | None = None  # on the Hub

    @property
    def short_name(self) -> str:
        """The model's name without the type of the file."""
        return model_name(self.name.rpartition(":")[2])


def find_gguf(
    model: str | None,
    architectures: Mapping[str, Sequence[type[MoeModel]]],
    note: Note = ignore_note,
) -> GgufFile | None:
    """The GGUF file that MODEL names, of several parts the first; None if it names none.

    `architectures` are the known ones by `general.architecture`. What is there on this machine goes
    before names on the Hub. Raises ArtifactError if the file is broken, UnsupportedModelError if it
    is of an architecture that is not known, CheckpointError if its tensors are not those of its
    model, and SourceError if the Hub has no such file.
    """
    if not model:
        return None
    path = Path(os.path.expanduser(model))
    if os.path.isfile(path) and is_gguf(path):
        header = read_whole_header(path)
        names: tuple[str, str, str | None] = (path.name, model_name(path.name), None)
    elif os.path.exists(path) or (on_hub := hub_gguf_name(model)) is None:
        return None
    else:
        header = open_hub_gguf(*on_hub, note)
        name = Path(str(header.path).rpartition(":")[2]).name
        names = f"{on_hub[0]}:{name}", on_hub[0], _commit_of(header)
    found = model_from_gguf(header, architectures)
    made = MadeFolder(header, found.config, names[0].rpartition(":")[2])
    return GgufFile(header, found, made, *names)


def _commit_of(header: GgufHeader) -> str | None:
    """The commit of a file from the Hub, by its header or by its folder in the cache."""
    first = header.headers[0]
    if isinstance(first, HubGgufHeader) and first.blocks is not None:
        return first.blocks.commit
    places = [parent.name for parent in first.path.parents]
    at = places.index("snapshots") - 1 if "snapshots" in places[1:] else None
    return places[at] if at is not None and _COMMIT.fullmatch(places[at]) else None


def model_name(file_name: str) -> str:
    """A file's name without the type of its tensors and its number as a part.

    >>> model_name("Qwen3-30B-A3B-Q4_K_M-00001-of-00002.gguf")
    'Qwen3-30B-A3B'
    """
    part = parse_part_name(file_name)
    stem = part.stem if part else re.sub(r"\.gguf$", "", file_name, flags=re.IGNORECASE)
    label = hub_label(stem)
    if label is not None and stem.upper().endswith(label):
        return stem[: -len(label)].rstrip("-._") or stem
    return stem
