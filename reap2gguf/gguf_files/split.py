"""GGUF files in several parts: how llama.cpp names and marks them, reading them, cutting a file.

Parts are called NAME-00001-of-00003.gguf and so on. Each has the keys `split.no` (from zero),
`split.count` and `split.tensors.count` (of all parts together). The first part also has all keys of
the whole file, the others have none of them. See tools/gguf-split and src/llama-model-loader.cpp in
llama.cpp.

Cutting keeps the order and the bytes of the tensors. Each part is byte for byte what llama.cpp's
gguf-split writes for the same cuts. Memory: the header and 4 MiB of tensors.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from gguf import GGUF_DEFAULT_ALIGNMENT, GGUFValueType, Keys

from reap2gguf.atomic import whole_file
from reap2gguf.errors import ArtifactError, UsageError
from reap2gguf.files import is_own_file, is_plain, open_plain
from reap2gguf.gguf_files.part_names import parse_part_name, part_name
from reap2gguf.gguf_files.reader import KEYS_BEGIN, GgufHeader, GgufTensorInfo, read_gguf_header
from reap2gguf.gguf_files.writer import encode_key, encode_start, encode_tensor_info, padded
from reap2gguf.messages import shown

if TYPE_CHECKING:
    from reap2gguf.progress import Task

_NUMBER_KEY = Keys.Split.LLM_KV_SPLIT_NO
_COUNT_KEY = Keys.Split.LLM_KV_SPLIT_COUNT
TENSORS_KEY = Keys.Split.LLM_KV_SPLIT_TENSORS_COUNT
_MAX_PARTS = 2**16 - 1  # split.count has sixteen bits
_READ_BYTES = 2**21


def first_parts(paths: Iterable[Path]) -> list[Path]:
    """`paths` without the later parts whose first part is among them too."""
    given = list(paths)
    names = {str(path) for path in given}

    def has_first(path: Path) -> bool:
        part = parse_part_name(path.name)
        if part is None or part.number == 0:
            return False
        return str(path.with_name(part_name(part.stem, 0, part.count))) in names

    return [path for path in given if not has_first(path)]


@dataclass(frozen=True)
class SplitHeader(GgufHeader):
    """The headers of all parts as one.

    `path` is the first part's; an offset counts from the start of the part with that tensor.
    """

    parts: Sequence[GgufHeader] = ()

    @property
    def headers(self) -> Sequence[GgufHeader]:
        return self.parts

    def read(self, name: str, first: int = 0, last: int | None = None) -> npt.NDArray[np.uint8]:
        """Rows of a tensor, from the part that holds it; see GgufHeader.read."""
        for part in self.parts:
            if name in part.tensors:
                return part.read(name, first, last)
        raise KeyError(name)


def read_whole_header(path: Path) -> GgufHeader:
    """The header of a GGUF file; of all parts together if `path` is the first of several.

    Memory: the headers, each bounded as in `read_gguf_header`. Raises ArtifactError if a part is
    missing, broken or from another split, or if a tensor is in two parts.
    """
    return join_parts(read_gguf_header(path), _read_next)


def _read_next(path: Path) -> GgufHeader:
    part = parse_part_name(path.name)
    if part is not None and not is_plain(path):
        raise ArtifactError(f"{path}: part {part.number + 1} of {part.count} is missing")
    return read_gguf_header(path)


def join_parts(header: GgufHeader, read: Callable[[Path], GgufHeader]) -> GgufHeader:
    """The header of all parts together, if `header` is that of the first of several; else itself.

    `read` gives the headers of the others. Raises ArtifactError if a part is from another split, or
    if a tensor is in two parts.
    """
    path = header.path
    count = header.metadata.get(_COUNT_KEY, 0)
    if not count:
        return header
    if type(count) is not int or not 0 < count <= _MAX_PARTS:
        raise ArtifactError(f"{path}: {_COUNT_KEY} is {shown(count)}, expected 1 to {_MAX_PARTS:,}")
    name = parse_part_name(path.name)
    number = header.metadata.get(_NUMBER_KEY)
    if type(number) is not int or name is None or (name.number, name.count) != (number, count):
        raise ArtifactError(
            f"{path}: its header says part {shown(number)} (from zero) of {count}, but its name "
            f"differs; expected NAME{part_name('', 0, count)}"
        )
    if number:
        first = part_name(name.stem, 0, count)
        raise ArtifactError(f"{path}: is part {number + 1} of {count}; pass the first, {first}")
    paths = [path.with_name(part_name(name.stem, n, count)) for n in range(count)]
    return _join(header, paths, read)


def _join(
    first: GgufHeader, paths: Sequence[Path], read: Callable[[Path], GgufHeader]
) -> SplitHeader:
    """One header from the first part's and the files of all parts."""
    parts = [first]
    tensors = dict(first.tensors)
    for number, path in enumerate(paths[1:], start=1):
        part = read(path)
        split_keys = {
            _NUMBER_KEY: number,
            _COUNT_KEY: len(paths),
            TENSORS_KEY: first.metadata.get(TENSORS_KEY),
        }
        for key, expected in split_keys.items():
            if part.metadata.get(key) != expected:
                found = shown(part.metadata.get(key))
                raise ArtifactError(f"{path}: {key} is {found}, expected {shown(expected)}")
        if twice := sorted(tensors.keys() & part.tensors.keys()):
            raise ArtifactError(f"{path}: holds {shown(twice[0])}, which another part holds too")
        tensors |= part.tensors
        parts.append(part)
    if (total := first.metadata.get(TENSORS_KEY)) != len(tensors):
        raise ArtifactError(
            f"{first.path}: {TENSORS_KEY} is {shown(total)}, its parts hold {len(tensors):,}"
        )
    own_keys = {key: value for key, value in first.metadata.items() if not key.startswith("split.")}
    return SplitHeader(
        first.path,
        own_keys,
        tensors,
        first.keys_end,
        {key: first.kinds[key] for key in own_keys},
        first.infos_end,
        first.alignment,
        sum(part.n_bytes for part in parts),
        tuple(parts),
    )


@dataclass(frozen=True)
class PlannedPart:
    """One part that a file is to be cut into: its name, its tensors, its size."""

    name: str
    number: int  # from zero
    count: int
    tensors: tuple[GgufTensorInfo, ...]
    n_bytes: int = 0


@dataclass(frozen=True)
class SplitPlan:
    """Where a file is to be cut."""

    header: GgufHeader
    keys: bytes  # of the whole file, as stored in it
    parts: tuple[PlannedPart, ...] = ()

    def head(self, part: PlannedPart) -> bytes:
        """Everything before the tensors of a part, padded to where the first one begins."""
        own_keys = b"" if part.number else self.keys
        n_own_keys = 0 if part.number else len(self.header.metadata)
        split_keys = (
            encode_key(_NUMBER_KEY, GGUFValueType.UINT16, part.number),
            encode_key(TENSORS_KEY, GGUFValueType.INT32, len(self.header.tensors)),
            encode_key(_COUNT_KEY, GGUFValueType.UINT16, part.count),
        )
        start = encode_start(len(part.tensors), n_own_keys + len(split_keys))
        encoded = [start, own_keys, *split_keys]
        alignment = self.alignment(part.number)
        offset = 0
        for info in part.tensors:
            encoded.append(encode_tensor_info(info, offset))
            offset += padded(info.n_bytes, alignment)
        head = b"".join(encoded)
        return head.ljust(padded(len(head), alignment), b"\0")

    def alignment(self, number: int) -> int:
        """The alignment in a part: only the first one has the key `general.alignment`."""
        alignment: int = self.header.metadata.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
        return GGUF_DEFAULT_ALIGNMENT if number else alignment


def plan_split(path: Path, max_bytes: int) -> SplitPlan:
    """Where to cut a file so that no part is larger than `max_bytes`.

    Raises UsageError if a single tensor is larger, or there would be too many parts; ArtifactError
    if the file is broken or already a part.
    """
    header = read_gguf_header(path)
    if _COUNT_KEY in header.metadata:
        raise ArtifactError(f"{path}: is a part of a split file already; join the parts first")
    with open_plain(path) as file:
        keys = file.read(header.keys_end)[KEYS_BEGIN:]
    uncut = SplitPlan(header, keys)
    groups: list[list[GgufTensorInfo]] = [[]]  # the tensors of each part
    size = _max_empty_bytes(uncut, 0)
    for info in header.tensors.values():
        info_bytes = len(encode_tensor_info(info, 0))
        grown = size + info_bytes + padded(info.n_bytes, uncut.alignment(len(groups) - 1))
        if grown > max_bytes and groups[-1]:
            groups.append([])
            size = _max_empty_bytes(uncut, 1)
            grown = size + info_bytes + padded(info.n_bytes, GGUF_DEFAULT_ALIGNMENT)
        if grown > max_bytes:
            raise UsageError(
                f"{path}: tensor {shown(info.name)} has {info.n_bytes:,} bytes and does not fit "
                f"into a file of {max_bytes:,} (with its header, {grown:,}); pass a larger "
                "--max-file-size"
            )
        size = grown
        groups[-1].append(info)
    if len(groups) > _MAX_PARTS:
        raise UsageError(
            f"{path}: would have {len(groups):,} parts, expected at most {_MAX_PARTS:,}; pass a "
            "larger --max-file-size"
        )
    return replace(uncut, parts=tuple(_sized_parts(uncut, path.stem, groups)))


def _sized_parts(
    uncut: SplitPlan, stem: str, groups: Sequence[Sequence[GgufTensorInfo]]
) -> Iterator[PlannedPart]:
    for number, tensors in enumerate(groups):
        name = part_name(stem, number, len(groups))
        part = PlannedPart(name, number, len(groups), tuple(tensors))
        alignment = uncut.alignment(number)
        n_bytes = len(uncut.head(part)) + sum(padded(i.n_bytes, alignment) for i in tensors)
        yield replace(part, n_bytes=n_bytes)


def _max_empty_bytes(plan: SplitPlan, number: int) -> int:
    """An upper bound for the size of a part without tensors, padding included."""
    empty = PlannedPart("", number, 1, ())
    return len(plan.head(empty)) + plan.alignment(number)


def write_part(plan: SplitPlan, part: PlannedPart, folder: Path, task: Task) -> tuple[Path, str]:
    """Write one part, whole or not at all; its path and the SHA-256 that it must have.

    A part that is there already, with its full size, is not written again. `task` advances by each
    byte. Raises OutputError if the disk refuses, ArtifactError if the file being cut has changed.
    """
    path = folder / part.name
    digest = hashlib.sha256()
    # a final name is only given to a complete file
    if is_own_file(path) and path.stat().st_size == part.n_bytes:
        for chunk in _contents(plan, part):
            digest.update(chunk)
            task.advance(len(chunk))
        return path, digest.hexdigest()
    with whole_file(path) as output:
        output.reserve(part.n_bytes)
        for chunk in _contents(plan, part):
            output.write(chunk)
            digest.update(chunk)
            task.advance(len(chunk))
    return path, digest.hexdigest()


def _contents(plan: SplitPlan, part: PlannedPart) -> Iterator[bytes]:
    """The bytes of a part, in order."""
    alignment = plan.alignment(part.number)
    yield plan.head(part)
    with open_plain(plan.header.path) as file:
        for info in part.tensors:
            file.seek(info.offset)
            left = info.n_bytes
            while left:
                chunk = file.read(min(left, _READ_BYTES))
                if not chunk:
                    raise ArtifactError(f"{plan.header.path}: was truncated while it was read")
                yield chunk
                left -= len(chunk)
            yield bytes(padded(info.n_bytes, alignment) - info.n_bytes)
