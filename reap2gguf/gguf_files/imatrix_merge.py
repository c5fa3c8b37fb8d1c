"""Adds importance matrices of one model that were computed on different texts.

Sums and counts add up, as in `llama-imatrix --in-file A --in-file B`: the result is what one pass
over all texts would have found, but for rounding. Memory: all matrices, and the sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from reap2gguf.errors import ArtifactError
from reap2gguf.gguf_files.imatrix import Imatrix

if TYPE_CHECKING:
    from reap2gguf.gguf_files.imatrix import ImatrixEntry

_MOST_CHUNKS = 2**31 - 1
_MOST_COUNTS = 2**53  # tokens; more are not exact in the files


@dataclass(frozen=True)
class MergedImatrix:
    """The sum of several matrices, and what some of them lack."""

    imatrix: Imatrix
    lacking: tuple[tuple[str, tuple[str, ...]], ...]  # of a file without some entries: which


def merge(given: Sequence[tuple[str, Imatrix]]) -> MergedImatrix:
    """The sum of matrices, each with the name of its file.

    An entry that some of them do not have is that of the others. Raises ArtifactError for entries
    of different shapes, for sums beyond float32, and if some count tokens and others calls.
    """
    _check_units(given)
    entries: dict[str, ImatrixEntry] = {}
    origins: dict[str, str] = {}
    for where, imatrix in given:
        for name, entry in imatrix.entries.items():
            if (before := entries.get(name)) is not None:
                entry = _added(before, entry, origins[name], where)
            else:
                origins[name] = where
            entries[name] = entry
    lacking = [
        (where, tuple(sorted(entries.keys() - imatrix.entries.keys()))) for where, imatrix in given
    ]
    chunk_size, n_chunks = _chunks([imatrix for _, imatrix in given])
    datasets = [text for _, imatrix in given for text in imatrix.datasets]
    first, *others = dict.fromkeys(datasets) or [""]
    result = Imatrix(entries, first, n_chunks, chunk_size, tuple(others))
    return MergedImatrix(result, tuple(one for one in lacking if one[1]))


def _check_units(given: Sequence[tuple[str, Imatrix]]) -> None:
    """Raises ArtifactError if some say how many tokens they saw and others do not."""
    sized = [where for where, imatrix in given if imatrix.chunk_size]
    unsized = [where for where, imatrix in given if not imatrix.chunk_size]
    if sized and unsized:
        raise ArtifactError(
            f"{unsized[0]}: counts calls, as .dat files do, and {sized[0]} counts tokens, so they "
            "cannot be weighed against each other; merge files of one kind"
        )


def _added(one: ImatrixEntry, other: ImatrixEntry, first: str, second: str) -> ImatrixEntry:
    if one.sums.shape != other.sums.shape:
        shapes = [" x ".join(map(str, entry.sums.shape)) for entry in (one, other)]
        raise ArtifactError(
            f"{second}: {one.name} has {shapes[1]} values, and {shapes[0]} in {first}; they are of "
            "different models, such as one before and one after pruning"
        )
    sums = one.sums.astype(np.float64) + other.sums
    counts = one.counts + other.counts
    if (sums > np.finfo(np.float32).max).any() or (counts >= _MOST_COUNTS).any():
        raise ArtifactError(f"{second}: {one.name}: the sum with {first} is too large for a file")
    return replace(one, sums=sums.astype(np.float32), counts=counts)


def _chunks(given: Sequence[Imatrix]) -> tuple[int, int]:
    """Tokens per chunk, and how many chunks of that size there are; the last one may be short."""
    size = given[0].chunk_size
    if all(one.chunk_size == size for one in given):
        total = sum(one.n_chunks for one in given)
    else:
        total = -(-sum(one.n_chunks * one.chunk_size for one in given) // size)
    return size, min(total, _MOST_CHUNKS)
