"""A GGUF file, or all its parts, in place of a checkpoint.

Names, shapes and config are those of the checkpoint that the file was made from; values are its
blocks, dequantized when they are read (`weights.py`). So whatever reads a
checkpoint reads a GGUF file: the passes over calibration text, an evaluation, an export.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from functools import cached_property
from typing import TYPE_CHECKING

from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.checkpoint.quantized.keys import READ_FROM_GGUF
from reap2gguf.errors import ArtifactError
from reap2gguf.files import open_plain
from reap2gguf.gguf_source.weights import GgufWeights
from reap2gguf.hub.gguf_file import HubGgufHeader

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    import numpy.typing as npt

    from reap2gguf.gguf_files.reader import GgufHeader
    from reap2gguf.gguf_source.file import GgufFile

_SAMPLE_BYTES = 2**12  # of each tensor
_BITS = 8
_FULL_TYPES = ("F32", "F16", "BF16")


class GgufCheckpoint(Checkpoint):
    """The weights of a GGUF file under the names of a checkpoint, in float32."""

    def __init__(self, file: GgufFile) -> None:
        """Raises ArtifactError or CheckpointError if the file does not hold what it describes."""
        header, found = file.header, file.found
        super().__init__(file.made.path, found.config, {}, tuple(_paths(header)))
        self._file = file  # whose folder is there as long as this is
        self._header = header
        self.decoded = GgufWeights(header, found.model, found.template)
        self.tensors = self.decoded.tensors

    @property
    def gguf(self) -> GgufHeader:
        return self._header

    @property
    def blocks(self) -> GgufHeader:
        return self._header

    @property
    def shown(self) -> Path:
        return self._header.path

    def shown_name(self, name: str, entry: int = 0) -> str:
        return self.decoded.shown_name(name, entry)

    def kind(self, name: str) -> str:
        return self.decoded.kind(name)

    def read_bytes(self, name: str, first: int, buffer: npt.NDArray[np.uint8]) -> None:
        self.decoded.read_bytes(name, first, buffer)

    def expect_bytes(self, name: str, first: int, n_bytes: int) -> None:
        self.decoded.expect_bytes(name, first, n_bytes)

    def have_same_values(self, one: str, other: str) -> bool:
        return self.decoded.have_same_values(one, other)

    def fetch_ahead(self, names: Iterable[str]) -> None:
        self.decoded.fetch_ahead(names)

    def without_fetching(self) -> AbstractContextManager[None]:
        return self.decoded.without_fetching()

    @cached_property
    def n_bytes(self) -> int:
        """Bytes of all blocks."""
        return self.n_stored_bytes

    @property
    def n_stored_bytes(self) -> int:
        return sum(info.n_bytes for info in self._header.tensors.values())

    @property
    def n_file_bytes(self) -> int:
        return self._header.n_bytes

    @property
    def caveats(self) -> tuple[str, ...]:
        types = {info.tensor_type.name for info in self._header.tensors.values()}
        if types <= set(_FULL_TYPES):
            return ()
        bits = _BITS * self.n_bytes / self.n_parameters
        stored = f"{READ_FROM_GGUF} {bits:.2f} bits per weight"
        return (f"{stored}: its experts are ranked by dequantized weights",)

    def fingerprint(self) -> str:
        """A hash that differs between files: of headers, sizes, and bytes of every tensor.

        Costs a read of the headers and of 4 KiB per tensor. A file of the Hub counts by its hash
        there. Raises ArtifactError if a file cannot be read.
        """
        digest = hashlib.sha256()
        for part in self._header.headers:
            if isinstance(part, HubGgufHeader) and part.blocks is not None:
                file = part.blocks.file
                digest.update(f"{file.n_bytes} {file.blob}\n".encode())
                continue
            try:
                for sample in _samples(part):
                    digest.update(sample)
            except OSError as error:
                raise ArtifactError(
                    f"{part.path}: cannot be read ({error.strerror or error})"
                ) from error
        return digest.hexdigest()

    def stamps(self) -> list[tuple[str, int, int | str]]:
        found: list[tuple[str, int, int | str]] = []
        for part in self._header.headers:
            if isinstance(part, HubGgufHeader) and part.blocks is not None:
                found.append((part.path.name, part.n_bytes, part.blocks.file.blob))
            else:
                status = part.path.stat()
                found.append((part.path.name, status.st_size, status.st_mtime_ns))
        return found


def _paths(header: GgufHeader) -> Iterator[Path]:
    """The files of a model that are on this machine."""
    for part in header.headers:
        if not isinstance(part, HubGgufHeader):
            yield part.path


def _samples(part: GgufHeader) -> Iterator[bytes]:
    """Size, header, and some bytes of every tensor of one file."""
    with open_plain(part.path) as file:
        descriptor = file.fileno()
        yield f"{os.fstat(descriptor).st_size}\n".encode()
        yield os.pread(descriptor, part.infos_end, 0)
        for info in part.tensors.values():
            middle = info.offset + info.n_bytes // 2
            yield os.pread(descriptor, min(_SAMPLE_BYTES, info.n_bytes), middle)
