"""A checkpoint on disk: config, tensor headers and lazy reads; it holds no weights in memory."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from reap2gguf.checkpoint.config import MAX_CONFIG_BYTES, read_json
from reap2gguf.checkpoint.entries import check_entries
from reap2gguf.checkpoint.index import INDEX_NAME, SINGLE_NAME, compare_index, find_shards
from reap2gguf.checkpoint.mistaken import ADAPTER_CONFIG, what_to_pass
from reap2gguf.checkpoint.safetensors_header import FileTensor, parse_header, read_header
from reap2gguf.checkpoint.weights import Weights
from reap2gguf.errors import CheckpointError, SourceError
from reap2gguf.files import cached_blob, expect_range, open_entry, read_entry
from reap2gguf.messages import shown

if TYPE_CHECKING:
    from reap2gguf.progress import Progress

_READ_BYTES = 2**30  # the kernel moves at most 2 GiB per call
_SAMPLE_BYTES = 2**14
_SAMPLES_PER_FILE = 64
_TENSOR_SAMPLE_BYTES = 2**12


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
class Checkpoint(Weights):
    """An opened checkpoint folder. Reads are positioned, so threads may share one.

    Files that are still on the Hub are fetched when a tensor of them is read or expected.
    """

    folder: Path
    config: dict[str, Any]
    tensors: Mapping[str, FileTensor]
    shards: tuple[Path, ...]
    notes: tuple[str, ...] = ()  # what the user should know of the folder
    follow_links: bool = False  # whether shards may be links to any place
    _hub: RemoteShards | None = None
    _descriptors: dict[Path, int] = field(default_factory=dict, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @classmethod
    def open(
        cls, folder: Path, hub: RemoteShards | None = None, follow_links: bool = False
    ) -> Checkpoint:
        """Read the config, the index and every shard's header, and compare them.

        Of shards that `hub` has and the folder does not, only the headers are read. Raises
        SourceError if there is no such folder and CheckpointError if a file is missing, broken, a
        link outside the Hub's cache, or disagrees with another. With `follow_links`, weights may be
        links to any place.
        """
        if not folder.is_dir():
            raise SourceError(
                f"{folder}: no such folder; pass a checkpoint folder or a Hub name (owner/name)"
            )
        check_entries(folder, hub or (), follow_links)
        config_path = folder / "config.json"
        if not config_path.is_file():
            raise CheckpointError(f"{folder}: no config.json; {what_to_pass(folder)}")
        config = read_json(config_path)
        shards, mapped = find_shards(folder, hub or ())
        headers = _headers(shards, hub, follow_links)
        tensors: dict[str, FileTensor] = {}
        for shard, header in headers.items():
            if twice := tensors.keys() & header.keys():
                raise CheckpointError(
                    f"{shard}: holds {shown(min(twice))}, which another shard holds"
                )
            tensors |= header
        notes: tuple[str, ...] = ()
        if mapped is not None:
            compare_index(folder, mapped, tensors)
        elif len(shards) > 1:
            instead = f"the headers of its {len(shards)} shards are used instead"
            notes = (f"{folder}: no {INDEX_NAME}; {instead}",)
        elif shards[0].name == SINGLE_NAME and (folder / INDEX_NAME).is_file():
            unread = f"{INDEX_NAME} and the shards that it names are not"
            notes = (f"{folder}: {SINGLE_NAME} is used, as in transformers, and {unread}",)
        if (folder / ADAPTER_CONFIG).is_file():
            beside = f"an adapter ({ADAPTER_CONFIG}) lies beside the weights and is not applied"
            notes += (f"{folder}: {beside}",)
        return cls(folder, config, tensors, shards, notes, follow_links, hub)

    def read_bytes(self, name: str, first: int, buffer: npt.NDArray[np.uint8]) -> None:
        self._check_range(name, first, buffer.nbytes)
        tensor = self.tensors[name]
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
                    f"{tensor.path}: ends inside tensor {name!r}: {done:,} of {len(view):,} bytes; "
                    "the file was cut while it was in use"
                )
            done += count

    def expect_bytes(self, name: str, first: int, n_bytes: int) -> None:
        self._check_range(name, first, n_bytes)
        tensor = self.tensors[name]
        if self._hub is not None and self._hub.missing([tensor.path.name]):
            self._hub.expect([tensor.path])
        else:
            expect_range(self._descriptor(tensor.path), tensor.offset + first, n_bytes)

    def fingerprint(self) -> str:
        """A hash that differs between checkpoints: of config, sizes, and bytes of every tensor.

        Costs a read of 4 KiB per tensor and at most 64 of 16 KiB per shard, so that it is quick for
        a 60 GB model. A file of the Hub counts by its hash there, downloaded or not. Raises
        CheckpointError if a shard cannot be read.
        """
        digest = hashlib.sha256()
        digest.update(self._config_bytes())
        tensors: dict[Path, list[FileTensor]] = {}
        for tensor in self.tensors.values():
            tensors.setdefault(tensor.path, []).append(tensor)
        for shard in self.shards:
            size = self._size(shard)
            digest.update(f"{shard.name} {size}\n".encode())
            if blob := self._blob(shard):
                digest.update(blob.encode())
                continue
            step = max(size // _SAMPLES_PER_FILE, _SAMPLE_BYTES)
            descriptor = self._descriptor(shard)
            samples = [(position, _SAMPLE_BYTES) for position in range(0, size, step)]
            for tensor in tensors.get(shard, ()):
                middle = tensor.offset + tensor.n_bytes // 2
                samples.append((middle, min(_TENSOR_SAMPLE_BYTES, tensor.n_bytes)))
            try:
                for position, count in samples:
                    digest.update(os.pread(descriptor, count, position))
            except OSError as error:
                raise CheckpointError(f"{shard}: cannot be read ({error.strerror})") from error
        return digest.hexdigest()

    def _config_bytes(self) -> bytes:
        path = self.folder / "config.json"
        try:
            return read_entry(path, MAX_CONFIG_BYTES)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error

    def stamps(self) -> list[tuple[str, int, int | str]]:
        """Name, size and time of change of every shard: what a hash of samples may miss.

        For files of the Hub, their hash there instead of the time.
        """
        return [
            (shard.name, self._size(shard), self._blob(shard) or shard.stat().st_mtime_ns)
            for shard in self.shards
        ]

    @property
    def n_file_bytes(self) -> int:
        """Bytes of all shards."""
        return sum(map(self._size, self.shards))

    @property
    def unfetched_bytes(self) -> int:
        """Bytes of shards that are still to be downloaded."""
        if self._hub is None:
            return 0
        return sum(map(self._hub.size, self._hub.missing(shard.name for shard in self.shards)))

    def unfetched(self, names: Iterable[str]) -> list[str]:
        """The files of these tensors that are still to be downloaded."""
        if self._hub is None:
            return []
        return self._hub.missing(sorted({self.tensors[name].path.name for name in names}))

    def report_to(self, progress: Progress) -> None:
        """Where downloads of shards are shown from now on."""
        if self._hub is not None:
            self._hub.report_to(progress)

    def fetch_ahead(self, names: Iterable[str]) -> None:
        if self._hub is not None:
            self._hub.expect({self.tensors[name].path for name in names})

    def without_fetching(self) -> AbstractContextManager[None]:
        return nullcontext() if self._hub is None else self._hub.closed()

    def _size(self, shard: Path) -> int:
        if self._hub is not None and shard.name in self._hub:
            return self._hub.size(shard.name)
        return shard.stat().st_size

    def _blob(self, shard: Path) -> str | None:
        """The hash that a shard has on the Hub; None if it does not come from there."""
        if self._hub is not None and shard.name in self._hub:
            return self._hub.blob(shard.name)
        return cached_blob(shard)

    def close(self) -> None:
        """Close the shard files; a later read opens them again."""
        if self._hub is not None:
            self._hub.close()
        with self._lock:
            for descriptor in self._descriptors.values():
                os.close(descriptor)
            self._descriptors.clear()

    def __enter__(self) -> Checkpoint:
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


def _headers(
    shards: tuple[Path, ...], hub: RemoteShards | None, follow_links: bool
) -> dict[Path, dict[str, FileTensor]]:
    """The headers of all shards; those that are not downloaded come by ranged reads."""
    remote = hub.missing(shard.name for shard in shards) if hub is not None else []
    beginnings = hub.headers(remote) if hub is not None else {}
    headers: dict[Path, dict[str, FileTensor]] = {}
    for shard in shards:
        if hub is not None and shard.name in beginnings:
            size = hub.size(shard.name)
            headers[shard] = parse_header(shard, beginnings[shard.name], size)
        else:
            headers[shard] = read_header(shard, follow_links)
    return headers
