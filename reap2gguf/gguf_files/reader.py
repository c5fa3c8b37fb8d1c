"""Reads a GGUF file's header, and trusts none of its numbers.

Layout (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md): magic, version, tensor count,
key count; keys with typed values; tensor names, sizes `ne` (fastest first), types and offsets;
padding; tensor bytes.

gguf-py's reader maps the whole file and believes its counts. This one checks each count before it
allocates, and leaves the tensors on disk. Memory: below 48 times the bytes of the header (an
array's smallest item is one byte and becomes a Python object), with at most 2^22 items, which is
160 MiB.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from gguf import GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType, GGUFValueType

from reap2gguf.errors import ArtifactError
from reap2gguf.files import open_plain
from reap2gguf.gguf_files.tensor_types import block_of, row_bytes, type_of_number
from reap2gguf.messages import shown

_MAGIC = b"GGUF"
KEYS_BEGIN = 24  # after magic, version and two counts
_VERSIONS = (2, 3)
_MAX_TENSORS = 2**17
_MAX_KEYS = 2**16
_LENGTH = struct.Struct("<Q")  # of a string, before its bytes
_PIECE_BYTES = 2**16  # of the file, cut into strings; less than the longest string
_MAX_STRING_BYTES = 2**26
_MAX_KEY_BYTES = 2**16 - 1  # the limit of the format
_MAX_NAME_BYTES = 2**12  # ggml's own limit is 64
_MAX_ITEMS = 2**22  # of all arrays together; a vocabulary of 262,144 has 1.3 million
_MAX_HEADER_BYTES = 2**26  # a sparse file can claim any size and need no disk space
_MAX_DIMENSIONS = 4
_ALIGNMENTS = tuple(2**power for power in range(17))
SCALAR_LAYOUTS = {
    GGUFValueType.UINT8: "<B",
    GGUFValueType.INT8: "<b",
    GGUFValueType.UINT16: "<H",
    GGUFValueType.INT16: "<h",
    GGUFValueType.UINT32: "<I",
    GGUFValueType.INT32: "<i",
    GGUFValueType.FLOAT32: "<f",
    GGUFValueType.BOOL: "<?",
    GGUFValueType.UINT64: "<Q",
    GGUFValueType.INT64: "<q",
    GGUFValueType.FLOAT64: "<d",
}


Kind = tuple[GGUFValueType, ...]  # of a scalar, or ARRAY and the type of the items


@dataclass(frozen=True, slots=True)
class GgufTensorInfo:
    """One tensor of a GGUF file; `shape` is slowest first, `offset` from the file's start."""

    name: str
    tensor_type: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    n_bytes: int

    @property
    def row_bytes(self) -> int:
        return row_bytes(self.tensor_type, self.shape[-1])


@dataclass(frozen=True)
class GgufHeader:
    """The keys and tensor infos of a GGUF file."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensorInfo]  # in the order of their infos
    keys_end: int = 0  # the byte after the keys; they begin at byte KEYS_BEGIN
    kinds: dict[str, Kind] = field(default_factory=dict)  # the type of each key's value
    infos_end: int = 0  # the byte after the tensor infos
    alignment: int = GGUF_DEFAULT_ALIGNMENT
    n_bytes: int = 0  # of the file

    @property
    def headers(self) -> Sequence[GgufHeader]:
        """The header of each of its files: this one, or those of all parts."""
        return (self,)

    def read(self, name: str, first: int = 0, last: int | None = None) -> npt.NDArray[np.uint8]:
        """Rows [first, last) of one tensor, as bytes (n_rows, row_bytes).

        Raises ArtifactError if the file is gone or ends before them.
        """
        info = self.tensors[name]
        n_rows = info.n_bytes // info.row_bytes
        count = ((n_rows if last is None else last) - first) * info.row_bytes
        try:
            with open_plain(self.path) as file:
                file.seek(info.offset + first * info.row_bytes)
                raw = np.fromfile(file, dtype=np.uint8, count=count)
        except OSError as error:
            raise _unreadable(self.path, error) from error
        if raw.size != count:
            raise ArtifactError(f"{self.path}: ends inside tensor {shown(name)}")
        return raw.reshape(-1, info.row_bytes)


def _unreadable(path: Path, error: OSError) -> ArtifactError:
    return ArtifactError(f"{path}: cannot be read ({error.strerror or error})")


class Cursor:
    """A position in an open binary file, which it reads forward.

    What the file cannot hold is an ArtifactError before anything is allocated. The file is read,
    not mapped: if another process truncates it meanwhile, that is an error and not a signal.
    """

    def __init__(self, path: Path, file: BinaryIO, size: int | None = None) -> None:
        """`size` is that of the file; None for what the disk says."""
        self.path = path
        self.size = os.fstat(file.fileno()).st_size if size is None else size
        self.position = 0
        self._file = file

    @property
    def left(self) -> int:
        """Bytes from here to the end."""
        return self.size - self.position

    def take(self, count: int, what: str = "its header") -> bytes:
        """The next `count` bytes, which hold `what`."""
        if not 0 <= count <= self.left:
            raise ArtifactError(
                f"{self.path}: truncated: {what} needs {count:,} bytes at byte "
                f"{self.position:,}, the file has {self.size:,}"
            )
        raw = self._file.read(count)
        if len(raw) != count:
            raise ArtifactError(
                f"{self.path}: was truncated at byte {self.position:,} while it was read"
            )
        self.position += count
        return raw

    def number(self, layout: str, what: str = "its header") -> Any:
        """The next number, by its `struct` layout."""
        return struct.unpack(layout, self.take(struct.calcsize(layout), what))[0]


class _HeaderCursor(Cursor):
    """Reads GGUF's counts, strings and values."""

    n_items = 0  # in all arrays so far

    def take(self, count: int, what: str = "its header") -> bytes:
        if count > _MAX_HEADER_BYTES - self.position:
            raise ArtifactError(
                f"{self.path}: truncated, or a header of over {_MAX_HEADER_BYTES:,} bytes: {what} "
                f"needs {count:,} at byte {self.position:,} of {self.size:,}"
            )
        return super().take(count, what)

    def count(self, what: str, limit: int) -> int:
        value = int(self.number("<Q"))
        if value > limit:
            raise ArtifactError(f"{self.path}: {value:,} {what}, expected at most {limit:,}")
        return value

    def string(self, limit: int = _MAX_STRING_BYTES) -> str:
        raw = self.take(self.count("bytes in a string", limit))
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ArtifactError(f"{self.path}: a string is not UTF-8 ({error.reason})") from error

    def _strings(self, count: int) -> list[str]:
        """The next `count` strings: a tokenizer has hundreds of thousands, mostly of few bytes.

        They are cut out of pieces of the file. What does not fit a piece, or is no string, is left
        to `string`.
        """
        found: list[str] = []
        while len(found) < count:
            piece = self._file.read(min(_PIECE_BYTES, self.left, _MAX_HEADER_BYTES - self.position))
            used = self._cut(piece, count, found)
            self.position += used
            self._file.seek(self.position)
            if len(found) < count:
                found.append(self.string())
        return found

    @staticmethod
    def _cut(piece: bytes, count: int, found: list[str]) -> int:
        """Add the strings that lie whole in a piece, up to `count`; the bytes that they take."""
        used, most = 0, len(piece)
        for _ in range(count - len(found)):
            begin = used + _LENGTH.size
            if begin > most:
                break
            end = begin + _LENGTH.unpack_from(piece, used)[0]
            if end > most:
                break
            try:
                found.append(piece[begin:end].decode("utf-8"))
            except UnicodeDecodeError:
                break
            used = end
        return used

    def value_type(self) -> GGUFValueType:
        raw = self.number("<I")
        try:
            return GGUFValueType(raw)
        except ValueError as error:
            raise ArtifactError(f"{self.path}: unknown value type {raw}") from error

    def value(self) -> tuple[Any, Kind]:
        """A value and its type."""
        value_type = self.value_type()
        if value_type is not GGUFValueType.ARRAY:
            return self._scalar(value_type), (value_type,)
        item_type = self.value_type()
        return self._array(item_type), (value_type, item_type)

    def _scalar(self, value_type: GGUFValueType) -> Any:
        return (
            self.string()
            if value_type is GGUFValueType.STRING
            else self.number(SCALAR_LAYOUTS[value_type])
        )

    def _array(self, value_type: GGUFValueType) -> list[Any]:
        if value_type is GGUFValueType.ARRAY:
            raise ArtifactError(
                f"{self.path}: an array of arrays, which GGUF readers do not support"
            )
        # a string takes at least the eight bytes of its length
        smallest = (
            8 if value_type is GGUFValueType.STRING else struct.calcsize(SCALAR_LAYOUTS[value_type])
        )
        count = self.count("array items", min(self.left // smallest, _MAX_ITEMS - self.n_items))
        self.n_items += count
        if value_type is GGUFValueType.STRING:
            return self._strings(count)
        raw = self.take(count * smallest)
        if value_type is GGUFValueType.BOOL:
            return [byte != 0 for byte in raw]
        items: list[Any] = np.frombuffer(raw, SCALAR_LAYOUTS[value_type]).tolist()
        return items


def read_gguf_header(path: Path) -> GgufHeader:
    """The metadata and tensor infos of a GGUF file.

    Raises ArtifactError if the file is missing, truncated or inconsistent.
    """
    try:
        with open_plain(path) as file:
            return _read_header(_HeaderCursor(path, file))
    except OSError as error:
        raise _unreadable(path, error) from error


def parse_gguf_header(path: Path, raw: bytes, n_bytes: int) -> GgufHeader:
    """The header that `raw` holds, of a file of `n_bytes` that is called `path`."""
    return read_header_from(path, BytesIO(raw), n_bytes)


def read_header_from(path: Path, file: BinaryIO, n_bytes: int) -> GgufHeader:
    """The header of a file of `n_bytes` that `file` reads from its beginning."""
    return _read_header(_HeaderCursor(path, file, n_bytes))


def _read_header(cursor: _HeaderCursor) -> GgufHeader:
    if cursor.size == 0:
        raise ArtifactError(f"{cursor.path}: empty, expected a GGUF file")
    magic, version = cursor.take(4), cursor.number("<I")
    if magic != _MAGIC or version not in _VERSIONS:
        raise ArtifactError(
            f"{cursor.path}: begins with {magic!r} version {version}, expected GGUF version 2 or 3"
        )
    n_tensors = cursor.count("tensors", _MAX_TENSORS)
    n_keys = cursor.count("keys", _MAX_KEYS)
    metadata: dict[str, Any] = {}
    kinds: dict[str, Kind] = {}
    for _ in range(n_keys):
        key = cursor.string(_MAX_KEY_BYTES)
        if key in metadata:
            raise ArtifactError(f"{cursor.path}: the key {shown(key)} occurs twice")
        metadata[key], kinds[key] = cursor.value()
    keys_end = cursor.position
    infos = [_tensor_info(cursor) for _ in range(n_tensors)]
    alignment = metadata.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
    if type(alignment) is not int or alignment not in _ALIGNMENTS:
        raise ArtifactError(
            f"{cursor.path}: general.alignment is {shown(alignment)}, expected a power of two"
        )
    start = -(-cursor.position // alignment) * alignment
    placed = _placed(cursor, infos, start, alignment)
    tensors = {info.name: placed[info.name] for info in infos}
    end = cursor.position
    return GgufHeader(cursor.path, metadata, tensors, keys_end, kinds, end, alignment, cursor.size)


def _tensor_info(cursor: _HeaderCursor) -> GgufTensorInfo:
    """One tensor info; its offset counts from the start of the tensor data."""
    name = cursor.string(_MAX_NAME_BYTES)
    where = f"{cursor.path}: tensor {shown(name)}"
    n_dims = cursor.number("<I")
    if not 1 <= n_dims <= _MAX_DIMENSIONS:
        raise ArtifactError(f"{where} has {n_dims} dimensions, expected 1-4")
    ne = [cursor.count(f"values along an axis of {shown(name)}", 2**48) for _ in range(n_dims)]
    if 0 in ne:
        raise ArtifactError(f"{where} has no values: its sizes are {ne}")
    raw_type = cursor.number("<I")
    try:
        tensor_type = type_of_number(raw_type)
    except ValueError as error:
        raise ArtifactError(
            f"{where} has the unknown type {raw_type}; was the file made by another program, or "
            "with rows in another order (ik_llama.cpp has such types)?"
        ) from error
    block, _ = block_of(tensor_type)
    if ne[0] % block:
        raise ArtifactError(
            f"{where}: rows of {ne[0]} values are not a multiple of {tensor_type.name}'s block of "
            f"{block}"
        )
    offset = cursor.number("<Q")
    n_bytes = math.prod(ne[1:]) * row_bytes(tensor_type, ne[0])
    return GgufTensorInfo(name, tensor_type, tuple(reversed(ne)), offset, n_bytes)


def _placed(
    cursor: _HeaderCursor, infos: list[GgufTensorInfo], start: int, alignment: int
) -> dict[str, GgufTensorInfo]:
    """Tensor infos by name with offsets from the start of the file.

    Raises ArtifactError if an offset is unaligned, or a tensor overlaps another or the file's end.
    """
    size = cursor.size
    placed: dict[str, GgufTensorInfo] = {}
    position = start
    for info in sorted(infos, key=lambda info: info.offset):
        where = f"{cursor.path}: tensor {shown(info.name)}"
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
        placed[info.name] = GgufTensorInfo(
            info.name, info.tensor_type, info.shape, offset, info.n_bytes
        )
    return placed
