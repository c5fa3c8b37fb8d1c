"""Reads the tensors of a GGUF file that stays open, into buffers that are used again."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from reap2gguf.errors import ArtifactError
from reap2gguf.files import open_plain
from reap2gguf.gguf_files.split import SplitHeader
from reap2gguf.messages import shown

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from reap2gguf.gguf_files.reader import GgufHeader

_READ_BYTES = 2**30  # at a time; the kernel reads less than 2 GiB


@dataclass(frozen=True)
class TensorBytes:
    """The bytes of the tensors of an open file, or of all its parts. Threads may share it."""

    _places: Mapping[str, tuple[GgufHeader, int]]  # by tensor: its part, and the open file

    def read(self, name: str, first: int, buffer: npt.NDArray[np.uint8]) -> None:
        """Fill the 1D `buffer` with the bytes of a tensor from row `first` on.

        Raises ArtifactError if the file ends before them, OSError if it cannot be read.
        """
        part, descriptor = self._places[name]
        info = part.tensors[name]
        view, position, done = buffer.data, info.offset + first * info.row_bytes, 0
        while done < len(view):
            some = view[done : done + _READ_BYTES]
            if not (count := os.preadv(descriptor, [some], position + done)):
                raise ArtifactError(f"{part.path}: ends inside tensor {shown(name)}")
            done += count


@contextmanager
def opened_tensors(header: GgufHeader) -> Iterator[TensorBytes]:
    """The tensors of a file, or of all its parts. Raises OSError if one cannot be opened."""
    parts = header.parts if isinstance(header, SplitHeader) else (header,)
    with ExitStack() as files:
        places: dict[str, tuple[GgufHeader, int]] = {}
        for part in parts:
            descriptor = files.enter_context(open_plain(part.path)).fileno()
            places |= {name: (part, descriptor) for name in part.tensors}
        yield TensorBytes(places)
