"""A GGUF file in memory, every part of which a test may change, and its bytes again.

It writes what no sound writer would: keys of any type, infos that disagree with the data. A file
that is read and written unchanged keeps every byte.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

Bytes = npt.NDArray[np.uint8]
ARRAY, STRING, BOOL = GGUFValueType.ARRAY, GGUFValueType.STRING, GGUFValueType.BOOL
_LAYOUTS = {
    GGUFValueType.UINT8: "B", GGUFValueType.INT8: "b", GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h", GGUFValueType.UINT32: "I", GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f", GGUFValueType.BOOL: "?", GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q", GGUFValueType.FLOAT64: "d",
}  # fmt: skip
# where the float16 scales are in a block of each type
_SCALES = {
    "Q8_0": (0,), "Q4_0": (0,), "Q5_0": (0,), "Q4_1": (0, 2), "Q5_1": (0, 2), "Q2_K": (80, 82),
    "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,),
    "IQ4_XS": (0,), "IQ3_S": (0,), "IQ3_XXS": (0,), "IQ2_S": (0,), "IQ2_XS": (0,), "IQ2_XXS": (0,),
}  # fmt: skip


@dataclass
class Key:
    """The value of a key; `items` is the type of an array's items."""

    type: GGUFValueType
    value: Any
    items: GGUFValueType | None = None

    def encoded(self) -> bytes:
        raw = struct.pack("<I", self.type)
        if self.type is not ARRAY:
            return raw + _encode(self.type, self.value)
        assert self.items is not None
        raw += struct.pack("<IQ", self.items, len(self.value))
        if self.items is STRING:
            return raw + b"".join(_string(item) for item in self.value)
        return raw + struct.pack(f"<{len(self.value)}{_LAYOUTS[self.items]}", *self.value)


@dataclass
class Tensor:
    """One tensor: its type, its sizes with the fastest axis first, and its bytes."""

    type: GGMLQuantizationType
    ne: list[int]
    data: Bytes

    @property
    def rows(self) -> Bytes:
        """(rows, bytes of a row), a view."""
        return self.data.reshape(self.data.size // self.row_bytes, -1)

    @property
    def row_bytes(self) -> int:
        block, size = GGML_QUANT_SIZES[self.type]
        return self.ne[0] // block * size

    @property
    def matrices(self) -> Bytes:
        """(experts, rows, bytes of a row), a view; one matrix if it has no experts."""
        return self.data.reshape(self.ne[2] if len(self.ne) > 2 else 1, -1, self.row_bytes)

    @property
    def blocks(self) -> Bytes:
        """(blocks, bytes of a block), a view."""
        return self.data.reshape(-1, GGML_QUANT_SIZES[self.type][1])

    @property
    def is_float(self) -> bool:
        return self.type.name in ("F32", "F16", "BF16")

    def values(self) -> npt.NDArray[np.float32]:
        """The values of a float tensor, slowest axis first; a copy."""
        shape = self.ne[::-1]
        if self.type.name == "BF16":
            wide = self.data.view(np.uint16).astype(np.uint32) << 16
            return wide.view(np.float32).reshape(shape)
        layout = {"F32": np.float32, "F16": np.float16}[self.type.name]
        return self.data.view(layout).astype(np.float32).reshape(shape)

    def put(self, values: npt.NDArray[np.float32]) -> None:
        """Store values in the tensor's own float type."""
        self.ne[:] = values.shape[::-1]
        flat = np.ascontiguousarray(values, dtype=np.float32).reshape(-1)
        if self.type.name == "BF16":
            self.data = np.ascontiguousarray(flat.view(np.uint16)[1::2]).view(np.uint8)
        else:
            layout = {"F32": np.float32, "F16": np.float16}[self.type.name]
            self.data = flat.astype(layout).view(np.uint8)

    def scale(self, factor: float, blocks: slice = slice(None)) -> None:
        """Multiply values; of a quantized tensor the scales of some blocks (all by default)."""
        if self.is_float:
            values = self.values().reshape(-1)
            values[blocks] *= factor
            self.put(values.reshape(self.ne[::-1]))
            return
        for at in _SCALES[self.type.name]:
            scales = np.ascontiguousarray(self.blocks[blocks, at : at + 2]).view(np.float16)
            self.blocks[blocks, at : at + 2] = (scales * np.float16(factor)).view(np.uint8)


@dataclass
class GgufEdit:
    """The keys and tensors of a file, in its order."""

    keys: dict[str, Key]
    tensors: dict[str, Tensor]
    extra_keys: list[tuple[str, Key]] = field(default_factory=list)  # may repeat a name
    alignment: int = 32
    tail: bytes = b""

    def encoded(self) -> bytes:
        entries = [*self.keys.items(), *self.extra_keys]
        parts = [b"GGUF", struct.pack("<IQQ", 3, len(self.tensors), len(entries))]
        parts += [_string(name) + key.encoded() for name, key in entries]
        offset = 0
        for name, tensor in self.tensors.items():
            layout = f"<I{len(tensor.ne)}QIQ"
            info = struct.pack(layout, len(tensor.ne), *tensor.ne, tensor.type, offset)
            parts.append(_string(name) + info)
            offset += -(-tensor.data.size // self.alignment) * self.alignment
        parts.append(self._padding(sum(map(len, parts))))
        for tensor in self.tensors.values():
            parts += [tensor.data.tobytes(), self._padding(tensor.data.size)]
        return b"".join([*parts, self.tail])

    def _padding(self, size: int) -> bytes:
        return bytes(-size % self.alignment)


def read_gguf(path: Path) -> GgufEdit:
    """The parts of a sound file."""
    raw = path.read_bytes()
    reader = _Reader(raw)
    magic, version, n_tensors, n_keys = reader.numbers("<4sIQQ")
    assert (magic, version) == (b"GGUF", 3), path
    keys = {reader.string(): reader.key() for _ in range(n_keys)}
    infos = []
    for _ in range(n_tensors):
        name = reader.string()
        (n_dims,) = reader.numbers("<I")
        infos.append((name, *reader.numbers(f"<{n_dims}QIQ")))
    alignment = keys["general.alignment"].value if "general.alignment" in keys else 32
    start = -(-reader.at // alignment) * alignment
    tensors = {}
    for name, *ne, number, offset in infos:
        tensor_type = GGMLQuantizationType(number)
        block, size = GGML_QUANT_SIZES[tensor_type]
        count = math.prod(ne) // block * size
        data = np.frombuffer(raw, np.uint8, count, start + offset).copy()
        tensors[name] = Tensor(tensor_type, ne, data)
    return GgufEdit(keys, tensors, alignment=alignment)


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _encode(value_type: GGUFValueType, value: Any) -> bytes:
    return (
        _string(value) if value_type is STRING else struct.pack("<" + _LAYOUTS[value_type], value)
    )


class _Reader:
    def __init__(self, raw: bytes) -> None:
        self._raw = raw
        self.at = 0

    def numbers(self, layout: str) -> tuple[Any, ...]:
        found = struct.unpack_from(layout, self._raw, self.at)
        self.at += struct.calcsize(layout)
        return found

    def string(self) -> str:
        (size,) = self.numbers("<Q")
        self.at += size
        return self._raw[self.at - size : self.at].decode()

    def key(self) -> Key:
        value_type = GGUFValueType(self.numbers("<I")[0])
        if value_type is STRING:
            return Key(STRING, self.string())
        if value_type is not ARRAY:
            return Key(value_type, self.numbers("<" + _LAYOUTS[value_type])[0])
        number, count = self.numbers("<IQ")
        items = GGUFValueType(number)
        return Key(ARRAY, list(self._items(items, count)), items)

    def _items(self, items: GGUFValueType, count: int) -> Iterator[Any]:
        if items is STRING:
            return (self.string() for _ in range(count))
        return iter(self.numbers(f"<{count}{_LAYOUTS[items]}"))
