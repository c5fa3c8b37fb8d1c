"""Tensors of safetensors files, read as they are stored, lazily and by any part of them."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

from reap2gguf.checkpoint.weights import Weights
from reap2gguf.errors import CheckpointError
from reap2gguf.files import expect_range, open_entry

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from reap2gguf.checkpoint.safetensors_header import FileTensor, StoredTensor
    from reap2gguf.progress import Progress

_READ_BYTES = 2**30  # the kernel moves at most 2 GiB per call


class RemoteShards(Protocol):
    """Shards that are not in the folder yet, as on the Hub: what a checkpoint needs of them.

    Shards are known by their file names; `in` says whether there is one of that name.
    """

    def __contains__(self, name: object, /) -> bool: ...

    def size(self, name: str) -> int:
        """Bytes of a file."""

    def blob(self, name: str) -> str:
        """The hash of a file."""

    def missing(self, names: Iterable[str]) -> list[str]:
        """Which of these files are not downloaded yet."""

    def headers(self, names: Iterable[str]) -> dict[str, bytes]:
        """The first bytes of files, with the whole header in them."""

    def report_to(self, progress: Progress) -> None:
        """Where downloads are shown from now on."""

    def expect(self, paths: Iterable[Path]) -> None:
        """Begin to download files that will be read soon; returns at once."""

    def wait_for(self, path: Path) -> None:
        """Return when a file is downloaded; CancelledError if the download is given up."""

    def close(self) -> None:
        """Give up what is being downloaded."""

    def closed(self) -> AbstractContextManager[None]:
        """A block in which nothing is downloaded."""


@dataclass
class TensorFiles(Weights):
    """The tensors of opened files. Reads are positioned, so threads may share one.

    Files that are still on the Hub are fetched when a tensor of them is read or expected.
    """

    folder: Path
    config: dict[str, Any]
    files: Mapping[str, FileTensor]  # what the shards hold
    shards: tuple[Path, ...]
    follow_links: bool = False  # whether shards may be links to any place
    _hub: RemoteShards | None = None
    _descriptors: dict[Path, int] = field(default_factory=dict, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    tensors: Mapping[str, StoredTensor] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.tensors = self.files

    def read_bytes(self, name: str, first: int, buffer: npt.NDArray[np.uint8]) -> None:
        self._check_range(name, first, buffer.nbytes)
        tensor = self.files[name]
        view, position = buffer.data, tensor.offset + first
        descriptor = self._descriptor(tensor.path)
        done = 0
        while done < len(view):
            try:
                count = os.preadv(descriptor, [view[done : done + _READ_BYTES]], position + done)
            except OSError as error:
                raise CheckpointError(
                    f"{tensor.path}: tensor {name!r} cannot be read ({error.strerror})"
                ) from error
            if count == 0:
                raise CheckpointError(
                    f"{tensor.path}: ends inside tensor {name!r}: {done:,} of {len(view):,} "
                    "bytes; the file was cut while it was in use"
                )
            done += count

    def expect_bytes(self, name: str, first: int, n_bytes: int) -> None:
        self._check_range(name, first, n_bytes)
        tensor = self.files[name]
        if self._hub is not None and self._hub.missing([tensor.path.name]):
            self._hub.expect([tensor.path])
        else:
            expect_range(self._descriptor(tensor.path), tensor.offset + first, n_bytes)

    def fetch_ahead(self, names: Iterable[str]) -> None:
        if self._hub is not None:
            self._hub.expect({self.files[name].path for name in names})

    def without_fetching(self) -> AbstractContextManager[None]:
        return nullcontext() if self._hub is None else self._hub.closed()

    def close(self) -> None:
        """Close the shard files; a later read opens them again."""
        if self._hub is not None:
            self._hub.close()
        with self._lock:
            for descriptor in self._descriptors.values():
                os.close(descriptor)
            self._descriptors.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _descriptor(self, path: Path) -> int:
        if self._hub is not None and path not in self._descriptors:
            self._hub.wait_for(path)
        with self._lock:
            if path not in self._descriptors:
                try:
                    with open_entry(path, self.follow_links) as file:
                        self._descriptors[path] = os.dup(file.fileno())
                except OSError as error:
                    raise CheckpointError(
                        f"{path}: cannot be read ({error.strerror or error})"
                    ) from error
            return self._descriptors[path]
