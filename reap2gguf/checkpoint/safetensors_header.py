"""The header of a safetensors file, read and checked before any tensor is.

Layout (https://huggingface.co/docs/safetensors): eight bytes of little-endian header length, a
JSON object of {name: {dtype, shape, data_offsets}}, then the bytes of the tensors without gaps.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reap2gguf.checkpoint.config import parse_json_object
from reap2gguf.errors import CheckpointError
from reap2gguf.files import open_entry
from reap2gguf.messages import shown

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

# A third of the reference implementation's limit; enough for a quarter of a million tensors.
MAX_HEADER_BYTES = 32 * 2**20
_MAX_DIMENSIONS = 8
_MAX_EMPTY = 2**20  # along an axis of a tensor without values
_NO_BLOCKS: Mapping[str, GGMLQuantizationType] = {}
ITEM_BYTES = {
    "F64": 8,
    "I64": 8,
    "U64": 8,
    "F32": 4,
    "I32": 4,
    "U32": 4,
    "F16": 2,
    "BF16": 2,
    "I16": 2,
    "U16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor as a safetensors file has it, or will have it."""

    name: str
    dtype: str  # safetensors' name, such as "BF16"
    shape: tuple[int, ...]
    # what these values are decoded from, such as "MXFP4"; "" if they are stored as they are
    coded: str = field(default="", kw_only=True)
    # of a GGUF source: the types of the GGUF tensors that they are read from, by name
    blocks: Mapping[str, GGMLQuantizationType] = field(
        default_factory=lambda: _NO_BLOCKS, kw_only=True, compare=False
    )

    @property
    def n_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def item_bytes(self) -> int:
        return ITEM_BYTES[self.dtype]

    @property
    def n_bytes(self) -> int:
        return self.n_elements * self.item_bytes


@dataclass(frozen=True, slots=True)
class FileTensor(StoredTensor):
    """One tensor as it is stored; `offset` counts from the start of the file."""

    path: Path
    offset: int


def read_header(path: Path, follow_links: bool = False) -> dict[str, FileTensor]:
    """The tensors of one safetensors file by name, in file order.

    Raises as `parse_header` does, and CheckpointError for a link, as `open_entry` follows them.
    """
    return _tensors(path, *_read_json(path, follow_links))


def parse_header(path: Path, beginning: bytes, size: int) -> dict[str, FileTensor]:
    """The tensors of a file of `size` bytes that is not on this machine yet, from its first bytes.

    Raises CheckpointError if a length, dtype, shape or offset is not possible in this file: every
    number is bounded before it is used. Memory: at most 40 times the bytes of the header, which has
    at most 32 MiB.
    """
    length = _header_length(path, size, beginning[:8])
    header = parse_json_object(_decode(path, beginning[8 : 8 + length]), f"{path}: header")
    return _tensors(path, header, 8 + length, size)


def _tensors(
    path: Path, header: dict[str, Any], data_start: int, size: int
) -> dict[str, FileTensor]:
    _metadata(path, header)
    tensors = [_entry(path, name, entry, data_start) for name, entry in header.items()]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.n_bytes))
    _check_contiguous(path, tensors, data_start, size)
    return {tensor.name: tensor for tensor in tensors}


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata in a safetensors file's header: texts by name. Raises CheckpointError."""
    return _metadata(path, _read_json(path)[0])


def _read_json(path: Path, follow_links: bool = False) -> tuple[dict[str, Any], int, int]:
    """The header as it is written, the offset of the first tensor, and the file's size."""
    try:
        with open_entry(path, follow_links) as file:
            size = os.fstat(file.fileno()).st_size
            length = _header_length(path, size, file.read(8))
            header = parse_json_object(_decode(path, file.read(length)), f"{path}: header")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
    return header, 8 + length, size


def _metadata(path: Path, header: dict[str, Any]) -> dict[str, str]:
    """Remove the metadata from a header and return it."""
    metadata = header.pop("__metadata__", None)
    if metadata is None:
        return {}
    is_text = isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())
    if not is_text:
        raise CheckpointError(f"{path}: __metadata__ is {shown(metadata)}, expected texts by name")
    return dict(metadata)


def _header_length(path: Path, size: int, prefix: bytes) -> int:
    if len(prefix) < 8:
        raise CheckpointError(f"{path}: {size} bytes, too short for a safetensors file")
    length = int.from_bytes(prefix, "little")
    limit = min(MAX_HEADER_BYTES, size - 8)
    if not 2 <= length <= limit:
        raise CheckpointError(
            f"{path}: claims a header of {length:,} bytes, expected 2 to {limit:,} in a file of "
            f"{size:,} bytes; download it again"
        )
    return length


def _decode(path: Path, raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: the header is not UTF-8 ({error.reason})") from error


def _entry(path: Path, name: str, entry: Any, data_start: int) -> FileTensor:
    where = f"{path}: tensor {shown(name)}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where}: expected dtype, shape and data_offsets in its header")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise CheckpointError(
            f"{where}: dtype {shown(dtype)}, expected one of {', '.join(ITEM_BYTES)}"
        )
    if not _naturals(shape) or len(shape) > _MAX_DIMENSIONS:
        raise CheckpointError(
            f"{where}: shape {shown(shape)}, expected at most 8 sizes from 0 to 2^48"
        )
    if 0 in shape and not _is_modest(shape):
        raise CheckpointError(f"{where}: shape {shown(shape)} holds nothing, expected small sizes")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{where}: data_offsets {shown(offsets)}, expected [begin, end]")
    expected = math.prod(shape) * ITEM_BYTES[dtype]
    if offsets[1] - offsets[0] != expected:
        raise CheckpointError(
            f"{where}: {offsets[1] - offsets[0]:,} bytes, expected {expected:,} for {dtype} {shape}"
        )
    return FileTensor(name, dtype, tuple(shape), path, data_start + offsets[0])


def _naturals(values: Any) -> bool:
    return isinstance(values, list) and all(
        isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**48
        for value in values
    )


def _is_modest(shape: list[int]) -> bool:
    # numpy multiplies an empty array's other sizes too
    return max(shape) <= _MAX_EMPTY and math.prod(size for size in shape if size) < 2**48


def _check_contiguous(path: Path, tensors: list[FileTensor], start: int, size: int) -> None:
    """Tensors must follow one another without gap or overlap, up to the end of the file."""
    position = start
    for tensor in tensors:
        if tensor.offset != position:
            kind = "overlaps the one before" if tensor.offset < position else "leaves a gap"
            raise CheckpointError(
                f"{path}: tensor {shown(tensor.name)} {kind}: it begins at byte {tensor.offset:,}, "
                f"expected {position:,}"
            )
        position += tensor.n_bytes
    if position != size:
        problem = "truncated" if size < position else "followed by unknown bytes"
        raise CheckpointError(
            f"{path}: {problem}: {size:,} bytes, expected {position:,} by its header; "
            "download it again"
        )
