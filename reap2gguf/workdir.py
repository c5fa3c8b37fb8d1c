"""Names of everything a build writes, done-marks of its stages, and the rename at the end.

OUTPUT/NAME/                        final, safetensors
OUTPUT/NAME-GGUF/                   final, GGUF
OUTPUT/.work/NAME/NAME/             the same, while being made
OUTPUT/.work/NAME/NAME-GGUF/
OUTPUT/.work/NAME.lock              held while a build of this name runs
OUTPUT/.work/NAME/stages.json       stage -> key of the inputs it was done with
OUTPUT/.work/observations/KEY.safetensors    kept: another ratio needs no new observation
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from reap2gguf.artifacts.manifest import Manifest
from reap2gguf.errors import ArtifactError, OutputError

# In order: making a stage anew undoes those after it.
STAGES = ("prune", "imatrix", "export")
_PUBLISHING = "publishing"  # there while final names are being given


def stage_key(*inputs: Any) -> str:
    """A hash that changes when any input of a stage does."""
    text = json.dumps(inputs, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@dataclass
class Workdir:
    """The folders of one build."""

    output: Path
    name: str

    @property
    def root(self) -> Path:
        return self.output / ".work" / self.name

    @property
    def hf(self) -> Path:
        """Where the safetensors are made."""
        return self.root / self.name

    @property
    def gguf(self) -> Path:
        """Where the GGUF bundle is made."""
        return self.root / f"{self.name}-GGUF"

    @property
    def final_hf(self) -> Path:
        return self.output / self.name

    @property
    def final_gguf(self) -> Path:
        return self.output / f"{self.name}-GGUF"

    def observations(self, key: str) -> Path:
        return self.output / ".work" / "observations" / f"{key}.safetensors"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep every other build of this name out while the context is open.

        The lock is the kernel's, so it ends with the process, however that ends. Raises OutputError
        if another build holds it, or if the output cannot be written.
        """
        path = self.output / ".work" / f"{self.name}.lock"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("a+", encoding="ascii")
        except OSError as error:
            raise OutputError(f"{self.output}: cannot be written ({error.strerror})") from error
        with file:
            self._take(file)
            yield

    def _take(self, file: TextIO) -> None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise OutputError(
                f"{self.root}: another build of {self.name} is at work there (process "
                f"{file.read(20).strip() or 'unknown'}); wait for it, or pass another --name or "
                "--output"
            ) from error
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()

    def prepare(self, fresh: bool) -> None:
        """Make the folders; `fresh` forgets finished stages.

        An interrupted publication is carried through first. Raises OutputError if the output cannot
        be written or a final name holds something that this program did not make.
        """
        if (self.root / _PUBLISHING).is_file():
            self.publish()
        for final in (self.final_hf, self.final_gguf):
            self._check_replaceable(final)
        try:
            if fresh and self.root.exists():
                shutil.rmtree(self.root)
            self.root.mkdir(parents=True, exist_ok=True)
            (self.output / ".work" / "observations").mkdir(exist_ok=True)
        except OSError as error:
            raise OutputError(f"{self.output}: cannot be written ({error.strerror})") from error

    def check_room(self, n_bytes: int) -> None:
        """Refuse a build of `n_bytes` for which the disk has no room, before the work.

        What an interrupted build left counts as written. Raises OutputError with the numbers.
        """
        written = sum(file.stat().st_size for file in self.root.rglob("*") if file.is_file())
        free = shutil.disk_usage(self.output).free
        if n_bytes - written > free:
            raise OutputError(
                f"{self.output}: the build writes {n_bytes:,} bytes, of which {written:,} are "
                f"there, and {free:,} are free on that disk; free some, or pass another --output"
            )

    def _check_replaceable(self, final: Path) -> None:
        """Only the same folder of an earlier build of the same name may be replaced."""
        if not os.path.lexists(final):
            return
        try:
            ours = Manifest.load(final).name == self.name
        except ArtifactError:
            ours = False
        if not ours:
            raise OutputError(
                f"{final}: exists and is no earlier build of {self.name}; pass another --output or "
                "--name, or move it away"
            )

    def earlier_files(self) -> list[str]:
        """GGUF files of an earlier build that this one will replace."""
        if not self.final_gguf.is_dir():
            return []
        return sorted(file.name for file in self.final_gguf.glob(f"*{self.name}-*.gguf"))

    def is_done(self, stage: str, key: str) -> bool:
        """Whether `stage` was finished with these inputs and its folder is still there."""
        folder = self.hf if stage == "prune" else self.gguf
        return folder.is_dir() and self._marks().get(stage) == key

    def mark_done(self, stage: str, key: str) -> None:
        """Remember that `stage` is finished with these inputs."""
        self._write_marks(self._marks() | {stage: key})

    @property
    def mtp_hits(self) -> int:
        """What the pruned model's MTP block predicted, counted with the importance matrix."""
        path = self.root / "mtp_hits"
        return int(path.read_text()) if path.is_file() else 0

    @mtp_hits.setter
    def mtp_hits(self, hits: int) -> None:
        (self.root / "mtp_hits").write_text(str(hits))

    def begin(self, stage: str, folder: Path) -> None:
        """Empty a stage's folder and forget it and all later stages."""
        earlier = STAGES[: STAGES.index(stage)]
        self._write_marks({s: k for s, k in self._marks().items() if s in earlier})
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir()

    def publish(self) -> None:
        """Give both folders their final names, in place of an earlier build's.

        May be called again after an interruption: what has its name already is left alone.
        """
        (self.root / _PUBLISHING).touch()
        for made, final in ((self.hf, self.final_hf), (self.gguf, self.final_gguf)):
            if not made.exists():
                continue
            old = self.root / f"old-{final.name}"
            if final.exists():
                if old.exists():
                    shutil.rmtree(old)
                os.replace(final, old)
            os.replace(made, final)
        (self.root / "stages.json").unlink(missing_ok=True)
        shutil.rmtree(self.root)

    def _marks(self) -> dict[str, str]:
        path = self.root / "stages.json"
        if not path.is_file():
            return {}
        try:
            marks = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            return {}  # cut off while being written: the stages are done again
        return marks if isinstance(marks, dict) else {}

    def _write_marks(self, marks: dict[str, str]) -> None:
        path = self.root / "stages.json"
        temporary = path.with_name("stages.json.tmp")
        temporary.write_text(json.dumps(marks), encoding="utf-8")
        os.replace(temporary, path)
