"""A checkpoint on disk: config, tensor headers and lazy reads; nothing is held in memory."""

from __future__ import annotations

import hashlib
import math
import os
import threading
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from reap2gguf.checkpoint.config import read_json
from reap2gguf.checkpoint.entries import check_entries
from reap2gguf.checkpoint.index import compare_index, find_shards
from reap2gguf.checkpoint.safetensors_header import StoredTensor, parse_header, read_header
from reap2gguf.checkpoint.values import NUMPY_TYPES, to_float32
from reap2gguf.errors import CheckpointError, SourceError
from reap2gguf.files import cached_blob
from reap2gguf.hub.shards import HubShards
from reap2gguf.messages import shown
from reap2gguf.progress import Progress

_READ_BYTES = 2**30  # the kernel moves at most 2 GiB a call
_SAMPLE_BYTES = 2**14
_SAMPLES_PER_FILE = 64
_TENSOR_SAMPLE_BYTES = 2**12


@dataclass
class Checkpoint:
    """An opened checkpoint folder. Reads are positioned, so threads may share one.

    Files that are still on the Hub are fetched when a tensor of them is read or expected.
    """

    folder: Path
    config: dict[str, Any]
    tensors: Mapping[str, StoredTensor]
    shards: tuple[Path, ...]
    _hub: HubShards | None = None
    _descriptors: dict[Path, int] = field(default_factory=dict, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @classmethod
    def open(cls, folder: Path, hub: HubShards | None = None) -> Checkpoint:
        """Read the config, the index and every shard's header, and compare them.

        Of shards that `hub` has and the folder has not, only the headers are read. Raises
        SourceError if there is no such folder and CheckpointError if a file is missing, broken, a
        link that leads out of the folder, or disagrees with another.
        """
        if not folder.is_dir():
            raise SourceError(
                f"{folder}: no such folder; pass a checkpoint folder or a Hub name (owner/name)"
            )
        check_entries(folder, hub or ())
        config_path = folder / "config.json"
        if not config_path.is_file():
            raise CheckpointError(f"{folder}: no config.json; this is no Hugging Face checkpoint")
        config = read_json(config_path)
        shards, mapped = find_shards(folder, hub or ())
        headers = _headers(shards, hub)
        tensors: dict[str, StoredTensor] = {}
        for shard, header in headers.items():
            if twice := tensors.keys() & header.keys():
                raise CheckpointError(
                    f"{shard}: holds {shown(min(twice))}, which another shard holds"
                )
            tensors |= header
        if mapped is not None:
            compare_index(folder, mapped, tensors)
        return cls(folder, config, tensors, shards, hub)

    @property
    def n_bytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(tensor.n_bytes for tensor in self.tensors.values())

    @property
    def n_parameters(self) -> int:
        return sum(tensor.n_elements for tensor in self.tensors.values())

    def read(
        self, name: str, first: int = 0, last: int | None = None, index: int | None = None
    ) -> npt.NDArray[np.generic]:
        """Rows `first` up to `last` along axis 0, as stored (BF16 as uint16 bits).

        With `index`, the rows are those of that entry along axis 0: expert `index` of a 3D tensor.
        Raises CheckpointError on a missing tensor or a short read.
        """
        tensor, shape, position = self._locate(name, first, last, index)
        result = np.empty(shape, dtype=NUMPY_TYPES[tensor.dtype])
        self._read_into(tensor, position, result)
        return result

    def read_bytes(self, name: str, first: int, buffer: npt.NDArray[np.uint8]) -> None:
        """Fill `buffer` with a tensor's stored bytes from byte `first` on.

        Raises CheckpointError on a missing tensor, bytes beyond its end, or a short read.
        """
        tensor = self.tensors.get(name)
        if tensor is None:
            raise CheckpointError(f"{self.folder}: no tensor {name!r}")
        if first < 0 or first + buffer.nbytes > tensor.n_bytes:
            raise CheckpointError(
                f"{tensor.path}: tensor {name!r} has {tensor.n_bytes:,} bytes, not "
                f"{first + buffer.nbytes:,}"
            )
        self._read_into(tensor, tensor.offset + first, buffer)

    def read_float32(
        self, name: str, first: int = 0, last: int | None = None, index: int | None = None
    ) -> npt.NDArray[np.float32]:
        """The same rows converted exactly to float32."""
        return to_float32(self.read(name, first, last, index), self.tensors[name].dtype, name)

    def expect(
        self, name: str, first: int = 0, last: int | None = None, index: int | None = None
    ) -> None:
        """Have the kernel fetch the rows that `read` will be asked for; returns at once."""
        tensor, shape, position = self._locate(name, first, last, index)
        if self._hub is not None and self._hub.missing([tensor.path.name]):
            self._hub.expect([tensor.path])
        elif hasattr(os, "posix_fadvise"):  # macOS has none
            # advice that a file system does not take costs speed and nothing else
            with suppress(OSError):
                os.posix_fadvise(
                    self._descriptor(tensor.path), position, math.prod(shape) * tensor.item_bytes,
                    os.POSIX_FADV_WILLNEED,
                )  # fmt: skip

    def fingerprint(self) -> str:
        """A hash that tells two checkpoints apart: config, headers, and bytes of every tensor.

        Costs a read of 4 KiB a tensor and at most 64 of 16 KiB a shard, so that it can be asked of
        a 60 GB model. Files of the Hub and its cache are told apart by their hashes there, whether
        they were fetched already or not. Raises CheckpointError if a shard cannot be read.
        """
        digest = hashlib.sha256()
        digest.update((self.folder / "config.json").read_bytes())
        for shard in self.shards:
            size = self._size(shard)
            digest.update(f"{shard.name} {size}\n".encode())
            if blob := self._blob(shard):
                digest.update(blob.encode())
                continue
            step = max(size // _SAMPLES_PER_FILE, _SAMPLE_BYTES)
            descriptor = self._descriptor(shard)
            places = [(position, _SAMPLE_BYTES) for position in range(0, size, step)]
            for tensor in self.tensors.values():
                if tensor.path == shard:
                    middle = tensor.offset + tensor.n_bytes // 2
                    places.append((middle, min(_TENSOR_SAMPLE_BYTES, tensor.n_bytes)))
            try:
                for position, count in places:
                    digest.update(os.pread(descriptor, count, position))
            except OSError as error:
                raise CheckpointError(f"{shard}: cannot be read ({error.strerror})") from error
        return digest.hexdigest()

    def stamps(self) -> list[tuple[str, int, int | str]]:
        """Name, size and time of change of every shard: what a hash of samples may miss.

        Of files of the Hub and its cache, their hash there in place of the time.
        """
        return [
            (shard.name, self._size(shard), self._blob(shard) or shard.stat().st_mtime_ns)
            for shard in self.shards
        ]

    @property
    def unfetched_bytes(self) -> int:
        """Bytes of shards that are still to be fetched."""
        if self._hub is None:
            return 0
        return sum(map(self._hub.size, self._hub.missing(shard.name for shard in self.shards)))

    def report_to(self, progress: Progress) -> None:
        """Where the fetching of shards is shown from now on."""
        if self._hub is not None:
            self._hub.report_to(progress)

    def fetch_ahead(self, names: Iterable[str]) -> None:
        """Begin to fetch the shards of tensors that will be read soon; returns at once."""
        if self._hub is not None:
            self._hub.expect({self.tensors[name].path for name in names})

    def without_fetching(self) -> AbstractContextManager[None]:
        """A block in which nothing is fetched: reading what is not there is a CancelledError."""
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
        """Close the shard files; reading again opens them anew."""
        if self._hub is not None:
            self._hub.close()
        with self._lock:
            for descriptor in self._descriptors.values():
                os.close(descriptor)
            self._descriptors.clear()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _locate(
        self, name: str, first: int, last: int | None, index: int | None
    ) -> tuple[StoredTensor, tuple[int, ...], int]:
        """The tensor, and the shape and file position of the part that `read` describes."""
        if name not in self.tensors:
            raise CheckpointError(f"{self.folder}: no tensor {name!r}")
        tensor = self.tensors[name]
        shape, position = tensor.shape, tensor.offset
        if index is not None:
            shape = shape[1:]
            position += index * math.prod(shape) * tensor.item_bytes
        if shape:
            position += first * math.prod(shape[1:]) * tensor.item_bytes
            shape = ((shape[0] if last is None else last) - first, *shape[1:])
        return tensor, shape, position

    def _descriptor(self, path: Path) -> int:
        if self._hub is not None and path not in self._descriptors:
            self._hub.wait_for(path)
        with self._lock:
            if path not in self._descriptors:
                try:
                    self._descriptors[path] = os.open(path, os.O_RDONLY)
                except OSError as error:
                    raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
            return self._descriptors[path]

    def _read_into(
        self, tensor: StoredTensor, position: int, target: npt.NDArray[np.generic]
    ) -> None:
        view = target.reshape(-1).view(np.uint8).data
        descriptor = self._descriptor(tensor.path)
        done = 0
        while done < len(view):
            try:
                count = os.preadv(descriptor, [view[done : done + _READ_BYTES]], position + done)
            except OSError as error:
                raise CheckpointError(
                    f"{tensor.path}: tensor {tensor.name!r} cannot be read ({error.strerror})"
                ) from error
            if count == 0:
                raise CheckpointError(
                    f"{tensor.path}: ends inside tensor {tensor.name!r}: {done:,} of "
                    f"{len(view):,} bytes; the file was cut while it was in use"
                )
            done += count


def _headers(
    shards: tuple[Path, ...], hub: HubShards | None
) -> dict[Path, dict[str, StoredTensor]]:
    """The headers of all shards; by ranged reads of those that are not here."""
    away = hub.missing(shard.name for shard in shards) if hub is not None else []
    beginnings = hub.headers(away) if hub is not None else {}
    headers: dict[Path, dict[str, StoredTensor]] = {}
    for shard in shards:
        if hub is not None and shard.name in beginnings:
            size = hub.size(shard.name)
            headers[shard] = parse_header(shard, beginnings[shard.name], size)
        else:
            headers[shard] = read_header(shard)
    return headers
