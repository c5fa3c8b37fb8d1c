"""Reads a GGUF file's header, trusting none of its numbers.

Layout (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md): magic, version, tensor count,
key count; keys with typed values; tensor names, sizes `ne` (fastest first), types and offsets;
padding; tensor bytes. gguf-py's own reader maps the file and believes its counts; this one bounds
each before it allocates, and leaves the tensors on disk.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType, GGUFValueType

from reap2gguf.errors import ArtifactError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MAX_TENSORS = 2**20
_MAX_KEYS = 2**16
_MAX_STRING_BYTES = 2**26
_MAX_DIMENSIONS = 4
_MAX_ALIGNMENT = 2**16
_SCALARS = {
    GGUFValueType.UINT8: "<B", GGUFValueType.INT8: "<b", GGUFValueType.UINT16: "<H",
    GGUFValueType.INT16: "<h", GGUFValueType.UINT32: "<I", GGUFValueType.INT32: "<i",
    GGUFValueType.FLOAT32: "<f", GGUFValueType.BOOL: "<?", GGUFValueType.UINT64: "<Q",
    GGUFValueType.INT64: "<q", GGUFValueType.FLOAT64: "<d",
}  # fmt: skip


def row_bytes(kind: GGMLQuantizationType, n_columns: int) -> int:
    """Bytes of a row of `n_columns` values, which must fill whole blocks."""
    block, size = GGML_QUANT_SIZES[kind]
    return int(n_columns // block * size)


@dataclass(frozen=True)
class GgufTensorInfo:
    """One tensor of a GGUF file; `shape` is slowest first, `offset` from the file's start."""

    name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    n_bytes: int

    @property
    def row_bytes(self) -> int:
        return row_bytes(self.kind, self.shape[-1])


@dataclass(frozen=True)
class GgufHeader:
    """What a GGUF file says of itself, before any tensor is read."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensorInfo]

    def read(self, name: str, first: int = 0, last: int | None = None) -> npt.NDArray[np.uint8]:
        """Rows [first, last) of one tensor, shaped (rows, bytes of a row).

        Raises ArtifactError if the file ends before them.
        """
        info = self.tensors[name]
        n_rows = info.n_bytes // info.row_bytes
        count = ((n_rows if last is None else last) - first) * info.row_bytes
        with self.path.open("rb") as file:
            file.seek(info.offset + first * info.row_bytes)
            raw = np.fromfile(file, dtype=np.uint8, count=count)
        if raw.size != count:
            raise ArtifactError(f"{self.path}: ends inside tensor {name!r}")
        return raw.reshape(-1, info.row_bytes)


class _Cursor:
    """Reads forward through the bytes of a file; running off the end is an ArtifactError."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self.data = data
        self.position = 0

    def take(self, count: int) -> bytes:
        end = self.position + count
        if end > len(self.data):
            raise ArtifactError(
                f"{self.path}: truncated: its header wants {end:,} bytes, the file has "
                f"{len(self.data):,}"
            )
        piece = self.data[self.position : end]
        self.position = end
        return piece

    def number(self, layout: str) -> Any:
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def count(self, what: str, limit: int) -> int:
        value = int(self.number("<Q"))
        if value > limit:
            raise ArtifactError(f"{self.path}: {value:,} {what}, expected at most {limit:,}")
        return value

    def string(self) -> str:
        raw = self.take(self.count("bytes in a string", _MAX_STRING_BYTES))
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ArtifactError(f"{self.path}: a string is not UTF-8 ({error.reason})") from error

    def kind(self) -> GGUFValueType:
        raw = self.number("<I")
        try:
            return GGUFValueType(raw)
        except ValueError as error:
            raise ArtifactError(f"{self.path}: unknown value type {raw}") from error

    def value(self) -> Any:
        kind = self.kind()
        return self._array() if kind is GGUFValueType.ARRAY else self._scalar(kind)

    def _scalar(self, kind: GGUFValueType) -> Any:
        return self.string() if kind is GGUFValueType.STRING else self.number(_SCALARS[kind])

    def _array(self) -> list[Any]:
        kind = self.kind()
        if kind is GGUFValueType.ARRAY:
            raise ArtifactError(f"{self.path}: an array of arrays, which GGUF readers do not take")
        # the shortest item is one byte (a string's length alone takes eight)
        smallest = 8 if kind is GGUFValueType.STRING else struct.calcsize(_SCALARS[kind])
        count = self.count("array items", (len(self.data) - self.position) // smallest)
        if kind is GGUFValueType.STRING:
            return [self.string() for _ in range(count)]
        layout = f"<{count}{_SCALARS[kind][1]}"
        return list(struct.unpack(layout, self.take(struct.calcsize(layout))))


def read_gguf_header(path: Path) -> GgufHeader:
    """The metadata and tensor infos of a GGUF file.

    Raises ArtifactError if the file is missing, truncated, or its numbers cannot be true.
    """
    try:
        with path.open("rb") as file, _map(path, file.fileno()) as data:
            cursor = _Cursor(path, data)
            return _read(cursor)
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read ({error.strerror or error})") from error


def _map(path: Path, descriptor: int) -> mmap.mmap:
    try:
        return mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
    except ValueError as error:  # mmap's word for an empty file
        raise ArtifactError(f"{path}: empty, expected a GGUF file") from error


def _read(cursor: _Cursor) -> GgufHeader:
    magic, version = cursor.take(4), cursor.number("<I")
    if magic != _MAGIC or version not in _VERSIONS:
        raise ArtifactError(
            f"{cursor.path}: begins with {magic!r} version {version}, expected GGUF version 2 or 3"
        )
    n_tensors = cursor.count("tensors", _MAX_TENSORS)
    n_keys = cursor.count("keys", _MAX_KEYS)
    metadata: dict[str, Any] = {}
    for _ in range(n_keys):
        key = cursor.string()
        if key in metadata:
            raise ArtifactError(f"{cursor.path}: the key {key!r} occurs twice")
        metadata[key] = cursor.value()
    infos = [_tensor(cursor) for _ in range(n_tensors)]
    alignment = metadata.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or not 1 <= alignment <= _MAX_ALIGNMENT:
        raise ArtifactError(f"{cursor.path}: general.alignment is {alignment!r}")
    start = -(-cursor.position // alignment) * alignment
    return GgufHeader(cursor.path, metadata, _place(cursor, infos, start, alignment))


def _tensor(cursor: _Cursor) -> GgufTensorInfo:
    """One tensor info, its offset still counted from the start of the tensor data."""
    name = cursor.string()
    n_dims = cursor.number("<I")
    if not 1 <= n_dims <= _MAX_DIMENSIONS:
        raise ArtifactError(f"{cursor.path}: tensor {name!r} has {n_dims} dimensions, expected 1-4")
    ne = [cursor.count(f"values along an axis of {name!r}", 2**48) for _ in range(n_dims)]
    if 0 in ne:
        raise ArtifactError(f"{cursor.path}: tensor {name!r} has no values: its sizes are {ne}")
    raw_kind = cursor.number("<I")
    try:
        kind = GGMLQuantizationType(raw_kind)
    except ValueError as error:
        raise ArtifactError(
            f"{cursor.path}: tensor {name!r} has the unknown type {raw_kind}; is it a file of "
            "another program (ik_llama.cpp has types of its own)?"
        ) from error
    block, size = GGML_QUANT_SIZES[kind]
    if ne[0] % block:
        raise ArtifactError(
            f"{cursor.path}: tensor {name!r}: rows of {ne[0]} are no multiple of {kind.name}'s "
            f"block of {block}"
        )
    offset = cursor.number("<Q")
    return GgufTensorInfo(name, kind, tuple(reversed(ne)), offset, math.prod(ne) // block * size)


def _place(
    cursor: _Cursor, infos: list[GgufTensorInfo], start: int, alignment: int
) -> dict[str, GgufTensorInfo]:
    """Absolute offsets, checked: aligned, in order, without overlap, within the file."""
    size = len(cursor.data)
    placed: dict[str, GgufTensorInfo] = {}
    position = start
    for info in sorted(infos, key=lambda info: info.offset):
        where = f"{cursor.path}: tensor {info.name!r}"
        offset = start + info.offset
        if info.name in placed:
            raise ArtifactError(f"{where} occurs twice")
        if info.offset % alignment or offset < position:
            raise ArtifactError(f"{where}: misplaced at byte {offset:,}, expected {position:,}")
        if offset + info.n_bytes > size:
            raise ArtifactError(
                f"{where}: ends at byte {offset + info.n_bytes:,}, the file has {size:,}: truncated"
            )
        position = offset + info.n_bytes
        placed[info.name] = GgufTensorInfo(info.name, info.kind, info.shape, offset, info.n_bytes)
    return placed
