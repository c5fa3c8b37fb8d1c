"""gguf-py's writer with its header in memory, so that files are written in one place (`disk`)."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

from gguf import GGUFWriter
from gguf.gguf_writer import WriterState


class HeaderWriter(GGUFWriter):  # type: ignore[misc]
    """Collects keys and tensor infos; `header` is what a file of them begins with."""

    def __init__(self, arch: str) -> None:
        super().__init__(None, arch)

    def open_output_file(self, path: Path | None = None) -> None:
        """Open memory in place of a file."""
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
        return bytes(GGUFWriter.ggml_pad(n_bytes, self.data_alignment) - n_bytes)
