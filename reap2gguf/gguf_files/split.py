"""Cuts a GGUF file into parts that the Hub takes, in llama.cpp's own layout.

The Hub takes files of up to 50 GB without Xet, and hands out none above over plain HTTP (see
`upload_file` and MAX_HTTP_DOWNLOAD_SIZE in huggingface_hub). Tensors keep their order and their
bytes; the first part has all keys, as llama.cpp's gguf-split has it, and each is byte for byte what
that program writes where the cuts fall alike. What is held in memory is the header and 4 MiB of
tensors.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from gguf import GGUF_DEFAULT_ALIGNMENT, GGUFValueType

from reap2gguf.atomic import whole_file
from reap2gguf.errors import ArtifactError, UsageError
from reap2gguf.files import open_plain
from reap2gguf.gguf_files.gguf_split import (
    COUNT_KEY,
    MAX_PARTS,
    NO_KEY,
    TENSORS_KEY,
    part_name,
)
from reap2gguf.gguf_files.reader import (
    KEYS_BEGIN,
    GgufHeader,
    GgufTensorInfo,
    read_gguf_header,
)
from reap2gguf.messages import shown
from reap2gguf.progress import Task

HUB_MAX_BYTES = 50 * 10**9
_PIECE_BYTES = 2**21
_VERSION = 3


@dataclass(frozen=True)
class Part:
    """One part of a file to be: its name, the tensors it takes and its size."""

    name: str
    number: int  # from zero
    count: int
    tensors: tuple[GgufTensorInfo, ...]
    n_bytes: int


@dataclass(frozen=True)
class SplitPlan:
    """How a file is cut."""

    header: GgufHeader
    keys: bytes  # of the whole file, as it has them
    parts: tuple[Part, ...]

    def head(self, part: Part) -> bytes:
        """Everything before the tensors of a part, padded to where the first one begins."""
        keys = [] if part.number else [self.keys]
        n_keys = 0 if part.number else len(self.header.metadata)
        marks = (
            _key(NO_KEY, GGUFValueType.UINT16, "<H", part.number),
            _key(TENSORS_KEY, GGUFValueType.INT32, "<i", len(self.header.tensors)),
            _key(COUNT_KEY, GGUFValueType.UINT16, "<H", part.count),
        )
        alignment = self.alignment(part.number)
        counts = (len(part.tensors), n_keys + len(marks))
        pieces = [b"GGUF", struct.pack("<IQQ", _VERSION, *counts), *keys, *marks]
        offset = 0
        for info in part.tensors:
            pieces.append(_tensor(info, offset))
            offset += _padded(info.n_bytes, alignment)
        head = b"".join(pieces)
        return head.ljust(_padded(len(head), alignment), b"\0")

    def alignment(self, number: int) -> int:
        """A part without `general.alignment` has the format's own."""
        alignment: int = self.header.metadata.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
        return GGUF_DEFAULT_ALIGNMENT if number else alignment


def plan_split(path: Path, max_bytes: int) -> SplitPlan:
    """Cut a file so that no part is above `max_bytes`.

    Raises UsageError if a tensor alone is, or the parts would be too many; ArtifactError if the
    file is broken or already a part.
    """
    header = read_gguf_header(path)
    if COUNT_KEY in header.metadata:
        raise ArtifactError(f"{path}: is a part of a split file already; join it first")
    with open_plain(path) as file:
        keys = file.read(header.keys_end)[KEYS_BEGIN:]
    whole = SplitPlan(header, keys, ())
    cuts: list[list[GgufTensorInfo]] = [[]]
    size = _bare_bytes(whole, 0)
    for info in header.tensors.values():
        grown = size + _info_bytes(info) + _padded(info.n_bytes, whole.alignment(len(cuts) - 1))
        if grown > max_bytes and cuts[-1]:
            cuts.append([])
            size = _bare_bytes(whole, 1)
            grown = size + _info_bytes(info) + _padded(info.n_bytes, GGUF_DEFAULT_ALIGNMENT)
        if grown > max_bytes:
            raise UsageError(
                f"{path}: tensor {shown(info.name)} has {info.n_bytes:,} bytes and fits no file of "
                f"{max_bytes:,} (with its header, {grown:,}); pass a larger --max-file-size"
            )
        size = grown
        cuts[-1].append(info)
    if len(cuts) > MAX_PARTS:
        raise UsageError(f"{path}: would be {len(cuts):,} parts, of which a file has {MAX_PARTS:,}")
    return SplitPlan(header, keys, tuple(_parts(whole, path.stem, cuts)))


def _parts(whole: SplitPlan, stem: str, cuts: Sequence[Sequence[GgufTensorInfo]]) -> list[Part]:
    parts = []
    for number, tensors in enumerate(cuts):
        name = part_name(stem, number, len(cuts))
        part = Part(name, number, len(cuts), tuple(tensors), 0)
        alignment = whole.alignment(number)
        n_bytes = len(whole.head(part)) + sum(_padded(i.n_bytes, alignment) for i in tensors)
        parts.append(Part(name, number, len(cuts), tuple(tensors), n_bytes))
    return parts


def _bare_bytes(plan: SplitPlan, number: int) -> int:
    """An upper bound of a part's header without tensors, its padding included."""
    bare = Part("", number, 1, (), 0)
    return len(plan.head(bare)) + plan.alignment(number)


def write_part(plan: SplitPlan, part: Part, folder: Path, task: Task) -> tuple[Path, str]:
    """Write one part, whole or not at all; where it lies, and the SHA-256 that it must have.

    One that is there whole is left as it is. `task` is told of each byte. Raises OutputError if the
    disk does not take it, ArtifactError if the file being cut changed meanwhile.
    """
    path = folder / part.name
    digest = hashlib.sha256()
    if path.is_file() and path.stat().st_size == part.n_bytes:  # a final name is of a whole file
        for piece in _pieces(plan, part):
            digest.update(piece)
            task.advance(len(piece))
        return path, digest.hexdigest()
    with whole_file(path) as output:
        output.reserve(part.n_bytes)
        for piece in _pieces(plan, part):
            output.write(piece)
            digest.update(piece)
            task.advance(len(piece))
    return path, digest.hexdigest()


def _pieces(plan: SplitPlan, part: Part) -> Iterator[bytes]:
    """The bytes of a part, in order."""
    alignment = plan.alignment(part.number)
    yield plan.head(part)
    with open_plain(plan.header.path) as file:
        for info in part.tensors:
            file.seek(info.offset)
            left = info.n_bytes
            while left:
                piece = file.read(min(left, _PIECE_BYTES))
                if not piece:
                    raise ArtifactError(f"{plan.header.path}: was cut while it was read")
                yield piece
                left -= len(piece)
            yield bytes(_padded(info.n_bytes, alignment) - info.n_bytes)


def _padded(n_bytes: int, alignment: int) -> int:
    return -(-n_bytes // alignment) * alignment


def _string(text: str) -> bytes:
    raw = text.encode("utf-8")
    return struct.pack("<Q", len(raw)) + raw


def _key(name: str, value_type: GGUFValueType, layout: str, value: int) -> bytes:
    return _string(name) + struct.pack("<I", value_type) + struct.pack(layout, value)


def _tensor(info: GgufTensorInfo, offset: int) -> bytes:
    """A tensor info; sizes fastest first."""
    sizes = tuple(reversed(info.shape))
    layout = f"<I{len(sizes)}QIQ"
    return _string(info.name) + struct.pack(layout, len(sizes), *sizes, info.tensor_type, offset)


def _info_bytes(info: GgufTensorInfo) -> int:
    return len(_tensor(info, 0))
