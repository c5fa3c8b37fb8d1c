"""Writes GGUF headers: by gguf-py into memory, or single entries as bytes.

gguf-py's own writer opens the output file. Here it only makes the header, so that every file is
written by `atomic`.
"""

from __future__ import annotations

import struct
from io import BytesIO
from pathlib import Path
from typing import Any

from gguf import GGUFValueType, GGUFWriter
from gguf.gguf_writer import WriterState

from reap2gguf.gguf_files.reader import SCALAR_LAYOUTS, GgufTensorInfo

_VERSION = 3


class HeaderWriter(GGUFWriter):  # type: ignore[misc]
    """Collects keys and tensor infos; `header` returns them as the first bytes of a GGUF file."""

    def __init__(self, arch: str) -> None:
        super().__init__(None, arch)

    def open_output_file(self, path: Path | None = None) -> None:
        """Open a buffer in memory instead of a file."""
        buffers: list[Any] = [BytesIO()]
        self.fout = buffers
        self.state = WriterState.EMPTY

    def header(self) -> bytes:
        """Everything before the tensors, padded to where the first one begins."""
        self.write_header_to_file()
        self.write_kv_data_to_file()
        self.write_ti_data_to_file()
        buffers: Any = self.fout
        written: bytes = buffers[0].getvalue()
        self.close()
        return written + self.padding(len(written))

    def padding(self, n_bytes: int) -> bytes:
        """Zeros between `n_bytes` of a tensor, or of the header, and the next tensor."""
        return bytes(padded(n_bytes, self.data_alignment) - n_bytes)


def padded(n_bytes: int, alignment: int) -> int:
    """`n_bytes` rounded up to a multiple of `alignment`."""
    return -(-n_bytes // alignment) * alignment


def encode_start(n_tensors: int, n_keys: int) -> bytes:
    """Magic, version and counts: the first 24 bytes of a GGUF file."""
    return b"GGUF" + struct.pack("<IQQ", _VERSION, n_tensors, n_keys)


def encode_key(name: str, value_type: GGUFValueType, value: float) -> bytes:
    """A key with a number as its value."""
    packed = struct.pack(SCALAR_LAYOUTS[value_type], value)
    return encode_string(name) + struct.pack("<I", value_type) + packed


def encode_tensor_info(info: GgufTensorInfo, offset: int) -> bytes:
    """A tensor info; `offset` counts from the start of the tensor data."""
    sizes = tuple(reversed(info.shape))  # GGUF has the fastest axis first
    layout = f"<I{len(sizes)}QIQ"
    packed = struct.pack(layout, len(sizes), *sizes, info.tensor_type, offset)
    return encode_string(info.name) + packed


def encode_string(text: str) -> bytes:
    """A string with its length before it."""
    raw = text.encode("utf-8")
    return struct.pack("<Q", len(raw)) + raw
