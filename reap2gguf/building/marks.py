"""Which stages of a build are done, with which inputs: `stages.json` in its work folder."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reap2gguf.artifacts.made_with import check_versions
from reap2gguf.atomic import write_whole
from reap2gguf.building.seals import read_seals
from reap2gguf.checkpoint.config import read_json
from reap2gguf.errors import CheckpointError

if TYPE_CHECKING:
    from reap2gguf.building.seals import Seal, Stamps

NOTHING = ""  # a key that no inputs have


@dataclass(frozen=True)
class Mark:
    """A stage that was begun with the inputs of a key, and its facts for later stages."""

    key: str
    is_done: bool = False
    facts: Mapping[str, Any] = field(default_factory=dict)
    stamps: Stamps = field(default_factory=dict)  # of its outputs when it was finished
    made_with: Mapping[str, str] = field(default_factory=dict)  # versions of libraries


class StageMarks:
    """The marks of one build, read once and written whole at each change; threads may share them.

    Stages that overlap are begun in their order before any of them computes. So a stage that was
    begun and is not done has undone those after it already, and resuming it leaves their marks.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._marks = _read_marks(path)
        self._changing = threading.RLock()

    def is_done(self, stage: str, key: str) -> bool:
        """Whether `stage` was finished with these inputs."""
        mark = self._marks.get(stage)
        return mark is not None and mark.is_done and mark.key == key

    def was_begun(self, stage: str, key: str) -> bool:
        """Whether `stage` was begun with these inputs, so that it can be resumed."""
        mark = self._marks.get(stage)
        return mark is not None and mark.key == key

    def is_under_way(self, stage: str, key: str) -> bool:
        """Whether `stage` was begun with these inputs and is not finished."""
        return self.was_begun(stage, key) and not self.is_done(stage, key)

    def begin(self, stage: str, key: str, undone: Sequence[str]) -> None:
        """A stage begins; the stages in `undone` are no longer done."""
        with self._changing:
            kept = {name: mark for name, mark in self._marks.items() if name not in undone}
            self._write(kept | {stage: Mark(key)})

    def finish(
        self,
        stage: str,
        key: str,
        facts: Mapping[str, Any],
        kept: Stamps,
        made_with: Mapping[str, str],
    ) -> None:
        """A stage is finished with these inputs; `facts` is plain JSON."""
        with self._changing:
            self._write(self._marks | {stage: Mark(key, True, facts, kept, made_with)})

    def void(self, stage: str) -> None:
        """A stage's outputs are not what it left: it cannot be resumed either."""
        with self._changing:
            self._write(self._marks | {stage: Mark(NOTHING)})

    def stamps(self, stage: str) -> Stamps:
        """The stamps of a finished stage's outputs."""
        return self._marks[stage].stamps

    def written_seals(self) -> dict[str, Seal]:
        """The hashes that finished stages made of files while they wrote them."""
        found: dict[str, Seal] = {}
        for mark in self._marks.values():
            found |= read_seals(mark.facts.get("written"))
        return found

    def made_with(self, stage: str) -> Mapping[str, str]:
        """The versions of the libraries that made a finished stage."""
        return self._marks[stage].made_with if stage in self._marks else {}

    def facts(self, stage: str) -> Mapping[str, Any]:
        """The facts of a finished stage."""
        return self._marks[stage].facts

    def _write(self, marks: dict[str, Mark]) -> None:
        write_whole(self._path, json.dumps({name: asdict(mark) for name, mark in marks.items()}))
        self._marks = marks


def _read_marks(path: Path) -> dict[str, Mark]:
    """The marks in a file; none if it is not there or damaged, so that stages are done again."""
    if not path.is_file():
        return {}
    try:
        return {name: _mark(**values) for name, values in read_json(path).items()}
    except (CheckpointError, TypeError, ValueError, AttributeError):
        return {}


def _mark(
    key: str,
    is_done: bool,
    facts: Mapping[str, Any],
    stamps: Mapping[str, Sequence[int]],
    made_with: Mapping[str, str],
) -> Mark:
    kept = {name: (int(n_bytes), int(ns)) for name, (n_bytes, ns) in stamps.items()}
    return Mark(key, is_done, facts, kept, check_versions(made_with))
