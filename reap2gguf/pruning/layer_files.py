"""New weights of experts in a folder: a file for each layer, whole or not there.

A file has a layer's new tensors under the names and in the type of the pruned checkpoint, none if
the layer keeps its weights, and in its metadata the key of what it was made from, facts of how it
was made and a SHA-256 of the tensors. Repairs and merges keep their layers so.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from reap2gguf.atomic import make_folder
from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.checkpoint.safetensors_header import StoredTensor, read_header, read_metadata
from reap2gguf.checkpoint.writer import write_safetensors
from reap2gguf.errors import ArtifactError, CheckpointError
from reap2gguf.pruning.layer_facts import Facts

if TYPE_CHECKING:
    from reap2gguf.checkpoint.weights import Weights

Bytes = npt.NDArray[np.uint8]
Replaced = Mapping[str, tuple[StoredTensor, Bytes]]  # tensors by name
_READ = 2**24  # bytes at a time


AnyFacts = TypeVar("AnyFacts", bound=Facts)


@dataclass(frozen=True)
class MadeLayer(Generic[AnyFacts]):
    """A layer that is done."""

    facts: AnyFacts
    sha256: str  # of its new tensors, see `tensors_sha256`; "" if there are none


@dataclass(frozen=True)
class LayerFiles(Generic[AnyFacts]):
    """The files of a repair or a merge."""

    path: Path
    key: str  # a hash of all that they depend on; files of another key count as missing
    kind: type[AnyFacts]

    def file(self, layer: int) -> Path:
        return self.path / f"layer-{layer:05d}.safetensors"

    def save(self, layer: int, facts: AnyFacts, tensors: Replaced) -> MadeLayer[AnyFacts]:
        """Write a layer's file, whole or not at all. Raises OutputError if the disk refuses."""
        make_folder(self.path)
        ordered = [tensors[name] for name in sorted(tensors)]
        sha256 = _sha256((stored, [content]) for stored, content in ordered)
        metadata = {"key": self.key, "facts": json.dumps(asdict(facts)), "sha256": sha256}
        write_safetensors(
            self.file(layer),
            [stored for stored, _ in ordered],
            lambda stored: [tensors[stored.name][1].data],
            metadata,
        )
        return MadeLayer(facts, sha256)

    def load(self, layer: int) -> MadeLayer[AnyFacts] | None:
        """A layer that was finished with this key; None if there is none, or it is damaged."""
        path = self.file(layer)
        if not path.is_file():
            return None
        try:
            metadata = read_metadata(path)
            if metadata.get("key") != self.key:
                return None
            facts: AnyFacts = self.kind.from_json(json.loads(metadata["facts"]))
            found = MadeLayer(facts, metadata["sha256"])
            with self._open([layer]) as stored:
                return found if tensors_sha256(stored, stored.tensors) == found.sha256 else None
        except (CheckpointError, KeyError, ValueError, TypeError):
            return None  # it is made again

    def load_all(self, layers: Iterable[int]) -> dict[int, MadeLayer[AnyFacts]]:
        """All layers, which are finished. Raises ArtifactError if one is missing or damaged."""
        found = {layer: self.load(layer) for layer in layers}
        for layer, one in found.items():
            if one is None:
                raise ArtifactError(
                    f"{self.file(layer)}: missing or damaged; run the same command again"
                )
        return {layer: one for layer, one in found.items() if one is not None}

    def open(self, layers: Iterable[int]) -> Checkpoint:
        """All new tensors of these layers, which the caller closes. Raises ArtifactError."""
        try:
            return self._open(layers)
        except CheckpointError as error:
            raise ArtifactError(str(error)) from error

    def _open(self, layers: Iterable[int]) -> Checkpoint:
        paths = tuple(self.file(layer) for layer in layers)
        tensors = {name: one for path in paths for name, one in read_header(path).items()}
        return Checkpoint(self.path, {}, tensors, paths)


def identity_of(layers: Iterable[MadeLayer[AnyFacts]]) -> str:
    """A hash of the new tensors of all layers."""
    return hashlib.sha256(repr([one.sha256 for one in layers]).encode()).hexdigest()


def tensors_sha256(weights: Weights, names: Iterable[str]) -> str:
    """SHA-256 of tensors with their names, types and shapes, in the order of names; "" of none.

    Raises CheckpointError if one cannot be read.
    """
    return _sha256((weights.tensors[name], _content(weights, name)) for name in sorted(names))


def _content(weights: Weights, name: str) -> Iterator[Bytes]:
    n_bytes = weights.tensors[name].n_bytes
    for first in range(0, n_bytes, _READ):
        buffer = np.empty(min(_READ, n_bytes - first), np.uint8)
        weights.read_bytes(name, first, buffer)
        yield buffer


def _sha256(tensors: Iterable[tuple[StoredTensor, Iterable[Bytes]]]) -> str:
    digest, is_empty = hashlib.sha256(), True
    for stored, parts in tensors:
        is_empty = False
        digest.update(f"{stored.name} {stored.dtype} {list(stored.shape)}\n".encode())
        for part in parts:
            digest.update(part.data)
    return "" if is_empty else digest.hexdigest()
