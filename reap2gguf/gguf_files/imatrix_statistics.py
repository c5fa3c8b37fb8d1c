"""Numbers of an importance matrix, one row per group of tensors, as llama-imatrix prints them.

A group holds the tensors of one name in all blocks, such as `blk.*.ffn_down_exps.weight`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from reap2gguf.gguf_files.imatrix import Imatrix, ImatrixEntry

_BLOCK = re.compile(r"^blk\.\d+\.")


@dataclass(frozen=True)
class TensorGroup:
    """The entries of one tensor name in all blocks."""

    name: str  # the block's number is `*`
    n_entries: int
    n_matrices: int  # experts count one each
    n_unseen: int  # matrices that no token reached
    fewest: int  # tokens of the matrix with the fewest
    median: int
    mean_square: float  # of the inputs, over all tokens and columns
    active: float  # share of the columns whose inputs were not always zero


@dataclass(frozen=True)
class ImatrixInspection:
    """An importance matrix: the text it was computed on, and its tensors by group."""

    dataset: str
    n_chunks: int
    chunk_size: int  # tokens; 0 where the format does not say
    groups: tuple[TensorGroup, ...]
    n_experts: int  # of all layers together
    n_unseen_experts: int


def inspect_imatrix(imatrix: Imatrix) -> ImatrixInspection:
    """The statistics of a matrix. Memory: a copy of one entry."""
    groups: dict[str, list[ImatrixEntry]] = {}
    for name, entry in imatrix.entries.items():
        groups.setdefault(_BLOCK.sub("blk.*.", name), []).append(entry)
    return ImatrixInspection(
        ", ".join(imatrix.datasets),
        imatrix.n_chunks,
        imatrix.chunk_size,
        tuple(_group(name, entries) for name, entries in sorted(groups.items())),
        sum(len(entry.counts) for entry in imatrix.expert_entries()),
        sum(imatrix.unseen_experts().values()),
    )


def _group(name: str, entries: list[ImatrixEntry]) -> TensorGroup:
    counts = np.concatenate([entry.counts for entry in entries])
    n_columns = sum(entry.sums.size for entry in entries)
    squares = sum(float(entry.sums.sum(dtype=np.float64)) for entry in entries)
    n_inputs = sum(float(entry.counts.sum()) * entry.sums.shape[1] for entry in entries)
    n_active = sum(int((entry.sums > 0).sum()) for entry in entries)
    return TensorGroup(
        name,
        len(entries),
        len(counts),
        int((counts == 0).sum()),
        int(counts.min()),
        int(np.median(counts)),
        squares / n_inputs if n_inputs else 0.0,
        n_active / n_columns if n_columns else 0.0,
    )
