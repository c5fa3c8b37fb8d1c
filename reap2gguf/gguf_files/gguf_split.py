"""GGUF files in parts, as llama.cpp's gguf-split names and marks them.

`NAME-00001-of-00003.gguf` and so on. Every part has `split.no` (from zero), `split.count` and
`split.tensors.count` (of all parts together); the first has the file's own keys too, the others
none of them. See tools/gguf-split and src/llama-model-loader.cpp in llama.cpp.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from gguf import Keys

from reap2gguf.errors import ArtifactError
from reap2gguf.files import is_plain
from reap2gguf.gguf_files.reader import GgufHeader, read_gguf_header
from reap2gguf.messages import shown

NO_KEY = Keys.Split.LLM_KV_SPLIT_NO
COUNT_KEY = Keys.Split.LLM_KV_SPLIT_COUNT
TENSORS_KEY = Keys.Split.LLM_KV_SPLIT_TENSORS_COUNT
MAX_PARTS = 2**16 - 1  # split.count has sixteen bits
_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


def part_name(stem: str, number: int, count: int) -> str:
    """The name of part `number` (from zero) of `count`.

    >>> part_name("model-Q4_K_M", 0, 3)
    'model-Q4_K_M-00001-of-00003.gguf'
    """
    return f"{stem}-{number + 1:05d}-of-{count:05d}.gguf"


def part_of_split(name: str) -> tuple[str, int, int] | None:
    """Stem, number (from zero) and count of a part's name; None if it is no such name."""
    match = _PART.fullmatch(name)
    if match is None:
        return None
    return match["stem"], int(match["number"]) - 1, int(match["count"])


def first_parts(paths: Iterable[Path]) -> list[Path]:
    """`paths` without those parts whose first one is among them: it stands for all."""
    given = list(paths)
    names = {str(path) for path in given}
    left = []
    for path in given:
        part = part_of_split(path.name)
        first = str(path.with_name(part_name(part[0], 0, part[2]))) if part else ""
        if not part or part[1] == 0 or first not in names:
            left.append(path)
    return left


@dataclass(frozen=True)
class SplitHeader(GgufHeader):
    """The headers of all parts as one; `path` is the first part's, offsets are of each part."""

    parts: Sequence[GgufHeader] = ()

    def read(self, name: str, first: int = 0, last: int | None = None) -> npt.NDArray[np.uint8]:
        """Rows of a tensor, from the part that holds it; see GgufHeader.read."""
        for part in self.parts:
            if name in part.tensors:
                return part.read(name, first, last)
        raise KeyError(name)


def read_whole_header(path: Path) -> GgufHeader:
    """The header of a GGUF file, or of all its parts together if it is the first of some.

    Only headers are held, each bounded as in `read_gguf_header`. Raises ArtifactError if a part is
    missing, broken, of another split, or holds a tensor that another holds too.
    """
    header = read_gguf_header(path)
    count = header.metadata.get(COUNT_KEY, 0)
    if not count:
        return header
    if type(count) is not int or not 0 < count <= MAX_PARTS:
        raise ArtifactError(f"{path}: {COUNT_KEY} is {shown(count)}, expected 1 to {MAX_PARTS:,}")
    place = part_of_split(path.name)
    number = header.metadata.get(NO_KEY)
    if type(number) is not int or place is None or place[1:] != (number, count):
        raise ArtifactError(
            f"{path}: says that it is part {shown(number)} (from zero) of {count}, and its name "
            f"does not; expected NAME{part_name('', 0, count)}"
        )
    if number:
        first = part_name(place[0], 0, count)
        raise ArtifactError(f"{path}: is part {number + 1} of {count}; name the first, {first}")
    return _join(header, [path.with_name(part_name(place[0], n, count)) for n in range(count)])


def _join(header: GgufHeader, paths: Sequence[Path]) -> SplitHeader:
    parts = [header]
    tensors = dict(header.tensors)
    for number, path in enumerate(paths[1:], start=1):
        if not is_plain(path):
            raise ArtifactError(f"{path}: part {number + 1} of {len(paths)} is missing")
        part = read_gguf_header(path)
        marks = {
            NO_KEY: number,
            COUNT_KEY: len(paths),
            TENSORS_KEY: header.metadata.get(TENSORS_KEY),
        }
        for key, expected in marks.items():
            if part.metadata.get(key) != expected:
                found = shown(part.metadata.get(key))
                raise ArtifactError(f"{path}: {key} is {found}, expected {shown(expected)}")
        if twice := sorted(tensors.keys() & part.tensors.keys()):
            raise ArtifactError(f"{path}: holds {shown(twice[0])}, which another part holds too")
        tensors |= part.tensors
        parts.append(part)
    if (total := header.metadata.get(TENSORS_KEY)) != len(tensors):
        raise ArtifactError(
            f"{header.path}: {TENSORS_KEY} is {shown(total)}, its parts hold {len(tensors):,}"
        )
    own = {key: value for key, value in header.metadata.items() if not key.startswith("split.")}
    return SplitHeader(header.path, own, tensors, header.keys_end, tuple(parts))
