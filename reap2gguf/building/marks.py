"""Which stages of a build are finished, and with which inputs; kept in a file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from reap2gguf.atomic import write_whole
from reap2gguf.checkpoint.config import read_json
from reap2gguf.errors import CheckpointError

# In order: a stage that is done anew undoes those after it.
NOTHING = ""  # a key that no inputs have
STAGES = ("prune", "imatrix", "export", "verify")


def stage_key(*inputs: Any) -> str:
    """A hash that changes when any input of a stage does."""
    text = json.dumps(inputs, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Mark:
    """A stage that was begun with the inputs of a key, and what it found out for those after it."""

    key: str
    is_done: bool = False
    found: Mapping[str, Any] = field(default_factory=dict)


class StageMarks:
    """The marks of one build, read once and written whole at each change."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._marks = _read(path)

    def is_done(self, stage: str, key: str) -> bool:
        """Whether `stage` was finished with these inputs."""
        mark = self._marks.get(stage)
        return mark is not None and mark.is_done and mark.key == key

    def was_begun(self, stage: str, key: str) -> bool:
        """Whether `stage` was begun with these inputs, so that it can go on."""
        mark = self._marks.get(stage)
        return mark is not None and mark.key == key

    def begin(self, stage: str, key: str) -> None:
        """A stage begins: it and all later ones are not done."""
        earlier = STAGES[: STAGES.index(stage)]
        kept = {name: mark for name, mark in self._marks.items() if name in earlier}
        self._write(kept | {stage: Mark(key)})

    def finish(self, stage: str, key: str, found: Mapping[str, Any]) -> None:
        """A stage is finished with these inputs; `found` is plain JSON."""
        self._write(self._marks | {stage: Mark(key, True, found)})

    def found(self, stage: str) -> Mapping[str, Any]:
        """What a finished stage found out."""
        return self._marks[stage].found

    def _write(self, marks: dict[str, Mark]) -> None:
        write_whole(self._path, json.dumps({name: asdict(mark) for name, mark in marks.items()}))
        self._marks = marks


def _read(path: Path) -> dict[str, Mark]:
    """The marks in a file; none if it is not there or damaged, so that stages are done again."""
    if not path.is_file():
        return {}
    try:
        values = read_json(path)
        return {name: Mark(**values[name]) for name in STAGES if name in values}
    except (CheckpointError, TypeError):
        return {}
