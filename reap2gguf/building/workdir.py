"""The folders of a build: their names, their owner, their lock, and the renaming at the end.

OUTPUT/NAME/                        final, safetensors; not if all experts are kept
OUTPUT/NAME-GGUF/                   final, GGUF
OUTPUT/.work/NAME/NAME/             the same, while being made
OUTPUT/.work/NAME/NAME-GGUF/
OUTPUT/.work/NAME/build.json        the source, and whether the build started with --fresh
OUTPUT/.work/NAME/stages.json       which stages are done, with which inputs (stage.py)
OUTPUT/.work/NAME/*.state           saved progress of a sweep, between two layers
OUTPUT/.work/NAME/export*.json      saved progress of an export, between two tensors
OUTPUT/.work/.NAME.lock             held while a build of this name runs
OUTPUT/.work/.NAME.finished.json    the inputs of the final files, and what they cost
OUTPUT/.work/.NAME.adding/          like NAME/, while files are added to a finished bundle
OUTPUT/.work/texts/KEY.safetensors         kept for other builds of this output:
OUTPUT/.work/observations/KEY.safetensors  another ratio repeats neither
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from reap2gguf.atomic import (
    make_folder,
    output_errors,
    part_of,
    refuse_link,
    remove,
    rename,
    write_whole,
)
from reap2gguf.building.finished import Finished, Inputs, read_finished
from reap2gguf.bundle.layout import SUMS_FILE, BundleFolders, gguf_name
from reap2gguf.bundle.manifest import Manifest
from reap2gguf.checkpoint.config import read_json
from reap2gguf.errors import ArtifactError, CheckpointError, OutputError
from reap2gguf.files import file_sha256

RESERVED_NAMES = frozenset(("texts", "observations"))  # folders that builds of one output share
_IDENTITY = "build.json"
_FINALIZING = "finalizing.json"  # exists while folders get their final names


@dataclass(frozen=True)
class Room:
    """What the disk has space for, besides the build itself."""

    keeps_states: bool = True  # to save the progress of a sweep between layers
    overlaps: bool = True  # to write the GGUF files while a sweep runs
    keeps_states_beside: bool = True  # to save that sweep's progress as well


@dataclass
class Workdir:
    """The folders of one build, or of an addition to a finished one."""

    output: Path
    name: str
    has_hf: bool = True  # whether the build writes safetensors
    is_addition: bool = False

    @property
    def shared(self) -> Path:
        """What builds of one output share."""
        return self.output / ".work"

    @property
    def root(self) -> Path:
        return self.shared / (f".{self.name}.adding" if self.is_addition else self.name)

    @property
    def peer(self) -> Path:
        """For processes of this build on another machine, which does not have the work folder."""
        return self.shared / f".{self.name}.peer"

    def drop_peer(self) -> None:
        """Remove that folder, and those around it if they are empty."""
        if self.peer.is_dir():
            remove(self.peer)
            with suppress(OSError):  # not empty, or a mounted disk
                self.shared.rmdir()
                self.output.rmdir()

    def of_addition(self) -> Workdir:
        """The folders for files that are added to the finished bundle."""
        return replace(self, is_addition=True)

    @property
    def hf(self) -> Path:
        """Where the safetensors are written."""
        return self.root / self.name

    @property
    def gguf(self) -> Path:
        """Where the GGUF bundle is written."""
        return self.root / gguf_name(self.name)

    @property
    def final_hf(self) -> Path:
        return self.output / self.name

    @property
    def final_gguf(self) -> Path:
        return self.output / gguf_name(self.name)

    @property
    def _finished(self) -> Path:
        return self.shared / f".{self.name}.finished.json"

    def shared_file(self, folder: str, key: str) -> Path:
        """A file of `texts` or `observations`, which builds of one output share."""
        return self.shared / folder / f"{key}.safetensors"

    def share(self, save: Callable[[Path], None], path: Path) -> None:
        """Let `save` write a shared file.

        It is written here first: a build of another name may be writing the same.
        """
        own = self.root / path.name
        save(own)
        rename(own, path)

    @property
    def is_fresh(self) -> bool:
        """Whether the build was started with --fresh and has not finished since."""
        return self._identity().get("fresh") is True

    def _identity(self) -> dict[str, Any]:
        try:
            return read_json(self.root / _IDENTITY)
        except CheckpointError:
            return {}  # no build has begun here, or it was killed while it wrote this

    def locked(self) -> AbstractContextManager[None]:
        """Keep every other build and push of this name out while the context is open.

        Raises OutputError if another one is running, or if the output cannot be written.
        """
        return BundleFolders(self.output, self.name).locked()

    def prepare(self, identity: Mapping[str, str], fresh: bool) -> None:
        """Create the folders; `fresh` forgets everything that was done.

        `identity` holds the source and its fingerprint: work of different sources is never mixed.
        An interrupted `finalize` is finished first. Raises OutputError if the output
        cannot be written, a final name holds something that this program did not make, or the work
        folder is that of another source.
        """
        self.finish_interrupted()
        for _, final in self._places:
            self._check_replaceable(final)
        if not self.has_hf:
            self._check_no_hf()
            remove(self.hf)  # of an attempt that was to prune
        if fresh:
            remove(self._finished)
            self._discard()
        self._check_identity(identity)
        for folder in (self.root, self.shared / "observations", self.shared / "texts"):
            make_folder(folder)
        is_fresh = fresh or self.is_fresh
        write_whole(self.root / _IDENTITY, json.dumps({**identity, "fresh": is_fresh}))

    def keep_all(self) -> None:
        """Go on without safetensors: all experts stay, as the build has found out.

        Raises OutputError if the result would replace only one folder of a bundle that has two.
        """
        self._check_no_hf()
        self.has_hf = False
        remove(self.hf)

    def finish_interrupted(self) -> None:
        """Finish an interrupted `finalize`, of a build or of an addition."""
        build = replace(self, is_addition=False)
        for work in (build, build.of_addition()):
            for path in (work.shared, work.root, work.hf, work.gguf, work._discarded):
                refuse_link(path)
            work._drop_discarded()
            if work.is_finalizing:
                replace(work, has_hf=work._records_hf)._resume_finalize()

    @property
    def is_finalizing(self) -> bool:
        """Whether the folders were given their final names when the program was killed."""
        return (self.root / _FINALIZING).is_file()

    @property
    def is_interrupted(self) -> bool:
        """Whether a build or an addition was killed at that moment."""
        build = replace(self, is_addition=False)
        return build.is_finalizing or build.of_addition().is_finalizing

    @property
    def _records_hf(self) -> bool:
        """Whether an interrupted `finalize` gives a name to safetensors, as it recorded."""
        files = self._recorded().get("files")
        if not isinstance(files, dict):
            return self.has_hf
        return any(str(name).startswith(f"{self.final_hf.name}/") for name in files)

    def prepare_addition(self, identity: Mapping[str, str]) -> None:
        """Create the folders; what an addition to another bundle has left is discarded."""
        for _, final in self._places:
            self._check_replaceable(final)
        if self._identity() != identity:
            self._discard()
        for folder in (self.root, self.gguf, *([self.hf] if self.has_hf else [])):
            make_folder(folder)
        write_whole(self.root / _IDENTITY, json.dumps(identity))

    def _check_identity(self, identity: Mapping[str, str]) -> None:
        """Refuse a work folder that another source, or another program, has written to."""
        ours = self.root / _IDENTITY
        if not self.root.is_dir() or not set(self.root.iterdir()) - {ours, part_of(ours)}:
            return  # it is empty
        advice = "pass --fresh to start over in it, or another --name or --output"
        try:
            found = read_json(self.root / _IDENTITY)
        except CheckpointError as error:
            raise OutputError(
                f"{self.root}: holds files, but no readable {_IDENTITY} that names their build; "
                f"{advice}"
            ) from error
        if found.get("fingerprint") != identity["fingerprint"]:
            raise OutputError(
                f"{self.root}: holds the work of another model, {str(found.get('source'))!r:.80} "
                f"({found.get('fingerprint')!s:.12}...), but this model is "
                f"{identity['source']!r} ({identity['fingerprint'][:12]}...); {advice}"
            )

    def written_bytes(self) -> int:
        """Size of what an interrupted build left here."""
        files = (file for folder in (self.hf, self.gguf) for file in folder.glob("*"))
        return sum(file.lstat().st_size for file in files)

    def free_bytes(self) -> int:
        """Free bytes on the disk of the output."""
        with output_errors(self.output):
            return shutil.disk_usage(self.output).free

    def check_room(self, n_bytes: int) -> None:
        """Refuse a build of `n_bytes` if the disk has too little space, before the work.

        What an interrupted build left counts as written. Raises OutputError with the numbers.
        """
        written, free = self.written_bytes(), self.free_bytes()
        if n_bytes - written > free:
            raise OutputError(
                f"{self.output}: the build writes {n_bytes:,} bytes ({written:,} are already "
                f"written), and {free:,} are free on that disk; free some space, pass another "
                "--output, or --no-space-check if that count is wrong"
            )

    def _check_replaceable(self, final: Path) -> None:
        """Only a folder of an earlier build of the same name may be replaced."""
        refuse_link(final)
        if os.path.lexists(final) and not self._is_ours(final):
            raise OutputError(
                f"{final}: exists and is not an earlier build of {self.name}; pass another "
                "--output or --name, or move it away"
            )

    def _is_ours(self, final: Path) -> bool:
        """Whether a folder is of an earlier build; a download may have another name than that."""
        try:
            name = Manifest.load(final).name
        except ArtifactError:
            return False
        return self.is_addition or name == self.name

    def _check_no_hf(self) -> None:
        """Refuse to replace only one folder of a bundle that has two."""
        if not self.final_gguf.exists():
            return
        if Manifest.load(self.final_gguf).hf is not None:
            raise OutputError(
                f"{self.final_gguf}: belongs to the safetensors in {self.final_hf}, and this "
                "build, which keeps all experts, would replace it alone; pass another --output or "
                "--name, or move both folders away"
            )

    def finalize(self, inputs: Inputs, costs: Sequence[Mapping[str, Any]]) -> None:
        """Give both folders their final names, in place of an earlier build's.

        If it is interrupted, `finish_interrupted` finishes it.
        """
        stats = {
            f"{final.name}/{file.name}": file.lstat()
            for made, final in self._places
            if made.is_dir()
            for file in sorted(made.iterdir())
        }
        files = {name: stat.st_size for name, stat in stats.items()}
        times = {name: stat.st_mtime_ns for name, stat in stats.items()}
        sums = self.gguf / SUMS_FILE
        record = {
            **asdict(inputs),
            "files": files,
            "changed_ns": times,
            "sums_sha256": file_sha256(sums) if sums.is_file() else "",
            "stages": costs,
        }
        write_whole(self.root / _FINALIZING, json.dumps(record, indent=1) + "\n")
        self._finalize()

    @property
    def _places(self) -> tuple[tuple[Path, Path], ...]:
        """Where each folder is made, and where it belongs."""
        of_gguf = (self.gguf, self.final_gguf)
        # without safetensors, the folder of their name may be the user's own: the source
        return ((self.hf, self.final_hf), of_gguf) if self.has_hf else (of_gguf,)

    def _finalize(self) -> None:
        for made, final in self._places:
            if not made.exists():
                continue  # has its name already
            old = self._old(final)
            self._check_replaceable(final)
            if final.exists():
                remove(old)
                rename(final, old)
            rename(made, final)
        self._discard()

    def _old(self, final: Path) -> Path:
        """Where an earlier build's folder goes before it is removed."""
        return self.root / f"old-{final.name}"

    def _resume_finalize(self) -> None:
        """Finish an interrupted `finalize`, unless a file has changed since it began.

        Then the folders go back, and the stages find out which of them has to be done again.
        """
        if self._is_as_recorded():
            self._finalize()
            return
        for made, final in self._places:
            # what lies there now may be the user's own
            if not made.exists() and final.exists() and self._is_ours(final):
                rename(final, made)
            if (old := self._old(final)).exists() and not final.exists():
                rename(old, final)
        remove(self.root / _FINALIZING)

    def _is_as_recorded(self) -> bool:
        """Whether each file has the size and the time of change that `finalize` recorded."""
        record = self._recorded()
        sizes, times = record.get("files"), record.get("changed_ns")
        if not isinstance(sizes, dict) or not isinstance(times, dict):
            return False
        places = {final.name: made if made.exists() else final for made, final in self._places}
        for name, n_bytes in sizes.items():
            folder, _, file = name.partition("/")
            path = places.get(folder, self.root) / file
            if not path.is_file():
                return False
            stat = path.stat()
            if (stat.st_size, stat.st_mtime_ns) != (n_bytes, times.get(name)):
                return False
        return True

    def _recorded(self) -> dict[str, Any]:
        """What `finalize` recorded; nothing if that cannot be read."""
        try:
            return read_json(self.root / _FINALIZING)
        except CheckpointError:
            return {}

    def finished(self) -> Finished | None:
        """The record of the finished bundle; None if there is none, or it cannot be read."""
        if not self._finished.is_file():
            return None
        try:
            return read_finished(read_json(self._finished))
        except (CheckpointError, TypeError, ValueError, AttributeError):
            return None

    def restamp(self, times: Mapping[str, int]) -> None:
        """Record other times of change of final files, whose bytes are those of the record."""
        record = read_json(self._finished)
        record["changed_ns"] = {**record["changed_ns"], **times}
        write_whole(self._finished, json.dumps(record, indent=1) + "\n")

    @property
    def _discarded(self) -> Path:
        return self.shared / f".{self.name}{'.adding' if self.is_addition else ''}.old"

    def _discard(self) -> None:
        """Remove the work folder. It is renamed first, since removing its files takes time."""
        if self.root.is_dir():
            rename(self.root, self._discarded)
        self._drop_discarded()

    def _drop_discarded(self) -> None:
        if (self._discarded / _FINALIZING).is_file():
            rename(self._discarded / _FINALIZING, self._finished)
        remove(self._discarded)
