"""What a damage is, and the copy of a bundle that it is done to.

The files of a copy are hard links to those of the sound bundle. So a file is never written in
place: `Copy.put` gives the name to a new file.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reap2gguf.bundle.layout import MANIFEST_FILE, SUMS_FILE
from reap2gguf.bundle.manifest import FileRecord, hash_file
from reap2gguf.checkpoint.index import INDEX_NAME
from tests.mutations.gguf_edit import GgufEdit, read_gguf
from tests.mutations.safetensors_edit import HfTensor, Shard, read_shard

if TYPE_CHECKING:
    from tests.mutations.models import Sound


class Absent(Exception):
    """A model has nothing that a damage could be done to."""


class Sight(IntEnum):
    """What a verification has to see, at the least, to tell that something is damaged."""

    BESIDE = 1  # the two folders of the bundle: something in them disagrees
    SOURCE = 2  # the model that was pruned: the bundle agrees with itself
    RECORD = 3  # nothing tells: a record of how the bundle was made, which no file depends on


class Fix(IntEnum):
    """Which hashes are computed again after the damage, as a program that knows of them would."""

    NONE = 0
    SUMS = 1  # SHA256SUMS, but not the manifest's, which are the damage
    ALL = 2


@dataclass(frozen=True)
class Damage:
    """One thing that is wrong with a bundle, or that only looks so.

    `harmless` is the reason why it changes nothing for anybody: then it must pass.
    """

    group: str
    name: str
    apply: Callable[[Copy], None]
    sight: Sight = Sight.BESIDE
    harmless: str = ""
    fix: Fix = Fix.ALL

    def __str__(self) -> str:
        return f"{self.group} {self.name}"


@dataclass(frozen=True)
class Copy:
    """Both folders of a bundle, finished or in a build's work folder, that a damage may change."""

    hf: Path
    gguf: Path
    sound: Sound

    @property
    def exact(self) -> Path:
        """The GGUF file without quantized types."""
        return self.gguf / self.sound.exact

    @property
    def quantized(self) -> Path:
        return self.gguf / self.sound.quantized

    @property
    def projector(self) -> Path:
        if self.sound.projector is None:
            raise Absent("no vision projector")
        return self.gguf / self.sound.projector

    @staticmethod
    def put(path: Path, contents: bytes | str) -> None:
        """Write a new file in place of a hard link."""
        new = path.with_name(path.name + ".new")
        new.write_bytes(contents.encode() if isinstance(contents, str) else contents)
        os.replace(new, path)

    @contextmanager
    def edit_gguf(self, path: Path) -> Iterator[GgufEdit]:
        edit = read_gguf(path)
        yield edit
        self.put(path, edit.encoded())

    @contextmanager
    def edit_json(self, path: Path) -> Iterator[Any]:
        if not path.is_file():
            raise Absent(f"no {path.name}")
        values = json.loads(path.read_text())
        yield values
        self.put(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")

    @contextmanager
    def edit_manifest(self) -> Iterator[Any]:
        """The manifest, changed in the same way in both folders."""
        path = self.gguf / MANIFEST_FILE
        if not path.is_file():
            raise Absent("no manifest yet")
        values = json.loads(path.read_text())
        yield values
        for folder in (self.gguf, self.hf):
            self.put(folder / MANIFEST_FILE, manifest_text(values))

    @contextmanager
    def edit_shards(self) -> Iterator[dict[str, Shard]]:
        """All shards by file name; written where something has changed."""
        files = sorted(self.hf.glob("*.safetensors"))
        shards = {file.name: read_shard(file) for file in files}
        yield shards
        for file in files:
            encoded = shards[file.name].encoded()
            if encoded != file.read_bytes():
                self.put(file, encoded)

    @contextmanager
    def edit_tensors(self) -> Iterator[dict[str, HfTensor]]:
        """All tensors of the safetensors; an added one goes to the first shard.

        The index is made to agree.
        """
        with self.edit_shards() as shards:
            tensors = {n: t for shard in shards.values() for n, t in shard.tensors.items()}
            before = set(tensors)
            yield tensors
            for shard in shards.values():
                shard.tensors = {n: tensors[n] for n in shard.tensors if n in tensors}
            first = next(iter(shards.values()))
            first.tensors |= {n: t for n, t in tensors.items() if n not in before}
            placed = {name: file for file, shard in shards.items() for name in shard.tensors}
        if (self.hf / INDEX_NAME).is_file() and set(placed) != before:
            with self.edit_json(self.hf / INDEX_NAME) as index:
                index["weight_map"] = placed
                index["metadata"]["total_size"] = sum(t.data.size for t in tensors.values())

    @contextmanager
    def edit_text(self, path: Path) -> Iterator[list[str]]:
        """The lines of a file, with their ends."""
        if not path.is_file():
            raise Absent(f"no {path.name}")
        lines = path.read_text().splitlines(keepends=True)
        yield lines
        self.put(path, "".join(lines))

    def fix_hashes(self, fix: Fix) -> None:
        """Make the recorded hashes and file sizes fit the damaged files."""
        path = self.gguf / MANIFEST_FILE
        if fix is Fix.ALL and path.is_file():
            self._fix_manifest()
        if fix is not Fix.NONE:
            self._fix_sums()

    def _fix_manifest(self) -> None:
        files = [f for f in sorted(self.hf.iterdir()) if f.is_file() and f.name != MANIFEST_FILE]
        records = {}
        for file in files:
            record = self._hash(file)
            records[file.name] = {"n_bytes": record.n_bytes, "sha256": record.sha256}
        for folder in (self.gguf, self.hf):
            path = folder / MANIFEST_FILE
            try:
                values = json.loads(path.read_text())
                values["hf"]["files"] = records
                for record in (*values["gguf"], *values["side_files"]):
                    if self._has_grown(record["file"]):
                        record["n_bytes"] = (self.gguf / record["file"]).stat().st_size
            except (OSError, ValueError, KeyError, TypeError):
                continue  # the manifest itself is damaged beyond that
            self.put(path, manifest_text(values))

    def _has_grown(self, name: str) -> bool:
        """Whether a file has another size than in the sound bundle."""
        sound = self.sound.gguf / name
        here = self.gguf / name
        both = sound.is_file() and here.is_file()
        return both and sound.stat().st_size != here.stat().st_size

    def _hash(self, file: Path) -> FileRecord:
        """The hash of a file, computed only once for one that is still the sound bundle's."""
        sound = (self.sound.hf if file.parent == self.hf else self.sound.gguf) / file.name
        if sound.is_file() and same_file(file, sound):
            return _hash_once(sound)
        return hash_file(file.resolve())

    def _fix_sums(self) -> None:
        files = (f for f in sorted(self.gguf.iterdir()) if f.is_file() and f.name != SUMS_FILE)
        lines = [f"{self._hash(file).sha256}  {file.name}\n" for file in files]
        if (self.gguf / SUMS_FILE).is_file():
            self.put(self.gguf / SUMS_FILE, "".join(lines))


def same_file(one: Path, other: Path) -> bool:
    """Whether two names are links to one file."""
    return not one.is_symlink() and os.path.samefile(one, other)


@cache
def _hash_once(path: Path) -> FileRecord:
    return hash_file(path)


def manifest_text(values: Any) -> str:
    """JSON in the manifest's form: lists of numbers on one line."""
    text = json.dumps(values, indent=1, ensure_ascii=False)
    return re.sub(r"\[\n[ \n\d,]+\]", lambda ids: " ".join(ids[0].split()), text) + "\n"


def find(edit: GgufEdit, stem: str, nth: int = 0) -> str:
    """The name of the tensor `stem` in the nth layer that has one, or outside the layers."""
    ends = (f".{stem}.weight", f".{stem}")
    names = [n for n in edit.tensors if n == f"{stem}.weight" or n.endswith(ends)]
    if len(names) <= nth:
        raise Absent(f"no tensor {stem}")
    return names[nth]
