"""Changes of GGUF files: single rows of their tensors, and keys of their headers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFValueType

from reap2gguf.gguf_files.reader import Kind, read_gguf_header
from reap2gguf.gguf_files.writer import HeaderWriter

Rows = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(frozen=True)
class Key:
    """The value of a key and its type."""

    value: Any
    kind: Kind


def change_rows(path: Path, name: str, change: Callable[[Rows], object]) -> None:
    """Change the bytes (rows, bytes of a row) of one tensor in place."""
    header = read_gguf_header(path)
    rows = header.read(name)
    change(rows)
    with path.open("r+b") as file:
        file.seek(header.tensors[name].offset)
        file.write(rows.tobytes())


def change_keys(path: Path, target: Path, change: Callable[[dict[str, Key]], object]) -> Path:
    """Write a copy of a file whose keys are changed; its tensors are the same."""
    header = read_gguf_header(path)
    keys = {name: Key(value, header.kinds[name]) for name, value in header.metadata.items()}
    change(keys)
    writer = HeaderWriter("none")
    writer.kv_data[0].clear()
    for name, key in keys.items():
        sub_type = key.kind[1] if len(key.kind) > 1 else None
        writer.add_key_value(name, key.value, key.kind[0], sub_type)
    infos = list(header.tensors.values())
    for info in infos:
        dtype = np.dtype(np.float32)
        writer.add_tensor_info(info.name, info.shape, dtype, info.n_bytes, info.tensor_type)
    raw = path.read_bytes()
    start = min((info.offset for info in infos), default=len(raw))
    target.write_bytes(writer.header() + raw[start:])
    return target


def as_type(key: Key, value_type: GGUFValueType) -> Key:
    """The same value with another type."""
    value = key.value
    floats = (GGUFValueType.FLOAT32, GGUFValueType.FLOAT64)
    convert: Callable[[Any], Any] = float if value_type in floats else int
    if isinstance(value, list):
        return Key([convert(item) for item in value], (GGUFValueType.ARRAY, value_type))
    return Key(convert(value), (value_type,))
