"""A checkpoint on disk: config, tensor headers and lazy reads; it holds no weights in memory."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from reap2gguf.checkpoint.config import MAX_CONFIG_BYTES, read_json
from reap2gguf.checkpoint.entries import check_entries
from reap2gguf.checkpoint.index import INDEX_NAME, SINGLE_NAME, compare_index, find_shards
from reap2gguf.checkpoint.mistaken import ADAPTER_CONFIG, what_to_pass
from reap2gguf.checkpoint.quantized.decoding import Decoding, read_decoding
from reap2gguf.checkpoint.safetensors_header import FileTensor, parse_header, read_header
from reap2gguf.checkpoint.tensor_files import RemoteShards, TensorFiles
from reap2gguf.errors import CheckpointError, SourceError
from reap2gguf.files import cached_blob, read_entry
from reap2gguf.messages import shown

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from reap2gguf.checkpoint.quantized.coded import CodedWeight
    from reap2gguf.checkpoint.weights import Weights
    from reap2gguf.progress import Progress

_SAMPLE_BYTES = 2**14
_SAMPLES_PER_FILE = 64
_TENSOR_SAMPLE_BYTES = 2**12


@dataclass
class Checkpoint(TensorFiles):
    """An opened checkpoint folder.

    Quantized weights are decoded by the rows that a read asks for, and `config` does not mention
    them; `stored` has both as they are in the files.
    """

    notes: tuple[str, ...] = ()  # what the user should know of the folder
    decoding: Decoding | None = None  # of quantized weights; None if there are none

    def __post_init__(self) -> None:
        decoding = self.decoding
        self.tensors = self.files if decoding is None else decoding.tensors(self.files)

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
        if mapped is not None:
            compare_index(folder, mapped, tensors)
        notes = tuple(_notes(folder, shards, is_mapped=mapped is not None))
        decoding = read_decoding(config, tensors, folder)
        if decoding is not None:
            config = decoding.plain_config
        opened = cls(folder, config, tensors, shards, follow_links, hub)
        return replace(opened, notes=notes, decoding=decoding)

    @property
    def stored(self) -> Weights:
        is_plain = self.decoding is None or self.decoding.is_written
        return self if is_plain else self._as_in_files

    @cached_property
    def _as_in_files(self) -> TensorFiles:
        config = self.config if self.decoding is None else self.decoding.config
        shared = self._descriptors, self._lock
        return TensorFiles(
            self.folder, config, self.files, self.shards, self.follow_links, self._hub, *shared
        )

    def dequantized(self) -> Checkpoint:
        """The same checkpoint as if it was stored in BF16; open files are shared."""
        if self.decoding is None:
            return self
        return replace(self, decoding=self.decoding.written())

    def parts(self, name: str) -> tuple[str, ...]:
        return (name,) if self.stored is self else self._parts(name)

    def _parts(self, name: str) -> tuple[str, ...]:
        """The tensors of the files that hold a tensor."""
        return (name,) if self.decoding is None else self.decoding.parts(name)

    def weight_name(self, part: str) -> str:
        return part if self.decoding is None else self.decoding.weight_names.get(part, part)

    def kind(self, name: str) -> str:
        weight = self._coded(name)
        return super().kind(name) if weight is None or self.stored is self else weight.kind

    def read_bytes(self, name: str, first: int, buffer: npt.NDArray[np.uint8]) -> None:
        weight = self._coded(name)
        if weight is None:
            super().read_bytes(name, first, buffer)
            return
        self._check_range(name, first, buffer.nbytes)
        weight.read_bytes(self._as_in_files, self.tensors[name].dtype, first, buffer)

    def expect_bytes(self, name: str, first: int, n_bytes: int) -> None:
        if weight := self._coded(name):
            self._check_range(name, first, n_bytes)
            codes = weight.codes_of_bytes(self.tensors[name].dtype, first, n_bytes)
            self._as_in_files.expect_bytes(weight.values, *codes)
        else:
            super().expect_bytes(name, first, n_bytes)

    def _coded(self, name: str) -> CodedWeight | None:
        """A weight that has to be decoded."""
        return None if self.decoding is None else self.decoding.weights.get(name)

    def fingerprint(self) -> str:
        """A hash that differs between checkpoints: of config, sizes, and bytes of every tensor.

        Costs a read of 4 KiB per tensor and at most 64 of 16 KiB per shard, so that it is quick for
        a 60 GB model. A file of the Hub counts by its hash there, downloaded or not. Raises
        CheckpointError if a shard cannot be read.
        """
        digest = hashlib.sha256()
        digest.update(self._config_bytes())
        tensors: dict[Path, list[FileTensor]] = {}
        for tensor in self.files.values():
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
    def n_stored_bytes(self) -> int:
        """Bytes of all tensors in the files, whatever they are read as."""
        return sum(tensor.n_bytes for tensor in self.files.values())

    @property
    def caveats(self) -> tuple[str, ...]:
        """What a user should know of how the weights are stored, one sentence each."""
        return () if self.decoding is None else self.decoding.caveats

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
        parts = (part for name in names for part in self._parts(name))
        return self._hub.missing(sorted({self.files[part].path.name for part in parts}))

    def report_to(self, progress: Progress) -> None:
        """Where downloads of shards are shown from now on."""
        if self._hub is not None:
            self._hub.report_to(progress)

    def fetch_ahead(self, names: Iterable[str]) -> None:
        super().fetch_ahead(part for name in names for part in self._parts(name))

    def _size(self, shard: Path) -> int:
        if self._hub is not None and shard.name in self._hub:
            return self._hub.size(shard.name)
        return shard.stat().st_size

    def _blob(self, shard: Path) -> str | None:
        """The hash that a shard has on the Hub; None if it does not come from there."""
        if self._hub is not None and shard.name in self._hub:
            return self._hub.blob(shard.name)
        return cached_blob(shard)


def _notes(folder: Path, shards: tuple[Path, ...], is_mapped: bool) -> Iterator[str]:
    """What the user should know of a folder; `is_mapped`: its index is used."""
    if not is_mapped and len(shards) > 1:
        instead = f"the headers of its {len(shards)} shards are used instead"
        yield f"{folder}: no {INDEX_NAME}; {instead}"
    elif not is_mapped and shards[0].name == SINGLE_NAME and (folder / INDEX_NAME).is_file():
        unread = f"{INDEX_NAME} and the shards that it names are not"
        yield f"{folder}: {SINGLE_NAME} is used, as in transformers, and {unread}"
    if (folder / ADAPTER_CONFIG).is_file():
        beside = f"an adapter ({ADAPTER_CONFIG}) lies beside the weights and is not applied"
        yield f"{folder}: {beside}"


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
