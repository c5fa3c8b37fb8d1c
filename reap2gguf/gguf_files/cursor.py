"""Reads a binary file forward; what the file cannot hold is refused before it is asked for."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any, BinaryIO

from reap2gguf.errors import ArtifactError


class Cursor:
    """A place in an open file. Running off the end is an ArtifactError, and allocates nothing.

    The file is read and not mapped: one that is cut meanwhile is an error too, and no signal.
    """

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path = path
        self.size = os.fstat(file.fileno()).st_size
        self.position = 0
        self._file = file

    @property
    def left(self) -> int:
        """Bytes from here to the end."""
        return self.size - self.position

    def take(self, count: int, what: str = "its header") -> bytes:
        """The next `count` bytes."""
        if not 0 <= count <= self.left:
            raise ArtifactError(
                f"{self.path}: truncated: {what} wants {count:,} bytes at byte "
                f"{self.position:,}, the file has {self.size:,}"
            )
        piece = self._file.read(count)
        if len(piece) != count:
            raise ArtifactError(f"{self.path}: was cut at byte {self.position:,} while it was read")
        self.position += count
        return piece

    def number(self, layout: str, what: str = "its header") -> Any:
        """The next number, by its `struct` layout."""
        return struct.unpack(layout, self.take(struct.calcsize(layout), what))[0]
