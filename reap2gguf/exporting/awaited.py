"""The importance that an export quantizes with, some of which may still be computed.

A tensor whose types need no importance, or that has none, is written at once. Any other waits for
its entry: in the thread that writes it, without a lock, and before any of its weights are read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Container, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from reap2gguf.ggml import UNWEIGHTED_TYPES
from reap2gguf.gguf_files.growing import GrowingEntries

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

    from reap2gguf.gguf_files.imatrix import ImatrixEntry
    from reap2gguf.models.description import GgufTensor

TypesOf = Mapping[str, Collection["GGMLQuantizationType"]]  # of each tensor, in all files


def is_weighted(name: str, types: Iterable[GGMLQuantizationType], entries: Container[str]) -> bool:
    """Whether a tensor has importance, and a type that needs it."""
    return name in entries and any(one.name not in UNWEIGHTED_TYPES for one in types)


class AwaitedImportance:
    """Which tensors of an export need which importance; threads may share it."""

    def __init__(self, entries: Mapping[str, ImatrixEntry], types_of: TypesOf) -> None:
        self.entries = entries
        self._weighted = {
            name for name, types in types_of.items() if is_weighted(name, types, entries)
        }
        self._digests: dict[str, str] = {}

    def expect_readers(self, n_threads: int) -> None:
        """Say how many threads will wait."""
        if isinstance(self.entries, GrowingEntries):
            self.entries.n_readers = n_threads

    def is_weighted(self, name: str) -> bool:
        """Whether a tensor has importance, and a type that needs it."""
        return name in self._weighted

    def is_final(self, name: str) -> bool:
        """Whether a tensor can be written now."""
        if name not in self._weighted or not isinstance(self.entries, GrowingEntries):
            return True
        return self.entries.is_final(name)

    def wait(self, name: str) -> None:
        """Wait until a tensor can be written; Stopped if it never can."""
        if name in self._weighted:
            self.entries[name]

    def stop(self) -> None:
        """Stop all threads that wait: the export has failed."""
        if isinstance(self.entries, GrowingEntries):
            self.entries.stop()

    def in_order(self, tensors: Sequence[GgufTensor]) -> list[GgufTensor]:
        """The tensors that can be written now, then those that wait, in the order of the file.

        Layers become final in that order.
        """
        return sorted(tensors, key=lambda tensor: not self.is_final(tensor.name))

    def digest(self, name: str) -> str:
        """A hash of what a tensor is quantized with; "" for none. Waits for its entry."""
        if name not in self._weighted:
            return ""
        if name not in self._digests:
            entry = self.entries[name]
            found = hashlib.sha256(np.ascontiguousarray(entry.sums).data)
            found.update(entry.counts.astype(np.float32).data)  # as importance is made of them
            self._digests[name] = found.hexdigest()
        return self._digests[name]
