"""The shards of a safetensors folder in memory, every part of which a test may change.

A shard that is read and written unchanged keeps every byte.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]


@dataclass
class HfTensor:
    """One tensor: dtype, shape and bytes."""

    dtype: str
    shape: list[int]
    data: Bytes

    @property
    def rows(self) -> Bytes:
        """(first axis, bytes of an entry), a view."""
        return self.data.reshape(self.shape[0], -1)

    @property
    def matrix(self) -> Bytes:
        """(..., rows, bytes of a row) by its shape, a view."""
        return self.data.reshape(*self.shape[:-1], -1)

    def values(self) -> npt.NDArray[np.float32]:
        """A copy as float32."""
        if self.dtype == "BF16":
            wide = self.data.view(np.uint16).astype(np.uint32) << 16
            return wide.view(np.float32).reshape(self.shape)
        layout = {"F32": np.float32, "F16": np.float16}[self.dtype]
        return self.data.view(layout).astype(np.float32).reshape(self.shape)

    def put(self, values: npt.NDArray[np.float32], dtype: str | None = None) -> None:
        """Store values, in another dtype if it is given."""
        self.dtype, self.shape = dtype or self.dtype, list(values.shape)
        flat = np.ascontiguousarray(values, dtype=np.float32).reshape(-1)
        if self.dtype == "BF16":
            self.data = np.ascontiguousarray(flat.view(np.uint16)[1::2]).view(np.uint8)
        else:
            layout = {"F32": np.float32, "F16": np.float16}[self.dtype]
            self.data = flat.astype(layout).view(np.uint8)

    def copy(self) -> HfTensor:
        return HfTensor(self.dtype, list(self.shape), self.data.copy())


@dataclass
class Shard:
    """One file. `change_header` may change its header at last."""

    tensors: dict[str, HfTensor]
    metadata: dict[str, str] | None
    change_header: Callable[[dict[str, Any]], None] | None = None
    gap: int = 0  # bytes before the first tensor
    tail: bytes = b""

    def encoded(self) -> bytes:
        header: dict[str, Any] = {}
        if self.metadata is not None:
            header["__metadata__"] = self.metadata
        end = self.gap
        for name, tensor in self.tensors.items():
            begin, end = end, end + tensor.data.size
            header[name] = {
                "dtype": tensor.dtype,
                "shape": tensor.shape,
                "data_offsets": [begin, end],
            }
        if self.change_header is not None:
            self.change_header(header)
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)
        data = [tensor.data.tobytes() for tensor in self.tensors.values()]
        start = len(encoded).to_bytes(8, "little") + encoded + bytes(self.gap)
        return b"".join([start, *data, self.tail])


def read_shard(path: Path) -> Shard:
    """The parts of a sound file."""
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    metadata = header.pop("__metadata__", None)
    tensors = {}
    for name, info in header.items():
        begin, end = info["data_offsets"]
        data = np.frombuffer(raw, np.uint8, end - begin, start + begin).copy()
        tensors[name] = HfTensor(info["dtype"], info["shape"], data)
    return Shard(tensors, metadata)
