"""The figures of `llama-imatrix --show-statistics`, and how often each expert was hit.

The values of a tensor are its mean squares: sums divided by counts, one per column and expert,
without the experts that no token reached. Definitions: llama.cpp, tools/imatrix/imatrix.cpp. It
sums in float32; here it is float64, so last digits may differ. Memory: four copies of one entry.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from reap2gguf.models.description import is_of_experts

if TYPE_CHECKING:
    from reap2gguf.gguf_files.imatrix import Imatrix, ImatrixEntry

_BLOCK = re.compile(r"^blk\.(\d+)\.")
_INACTIVE = 1e-5  # mean squares up to this do not count as active
Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True)
class TensorStatistics:
    """The mean squares of one tensor's inputs."""

    name: str
    layer: int | None  # None outside the blocks
    n_values: int  # columns, times the experts that were hit
    total: float
    smallest: float
    largest: float
    mean: float
    deviation: float  # standard deviation
    active: float  # share of the values above 1e-5
    entropy: float  # bits, of the values as shares of their total
    entropy_share: float  # of the entropy that equal values would have
    z_density: float  # share of the values more than one deviation above the mean
    cosine: float = 0.0  # of the sums with those of the same tensor one block earlier; 0 if none


@dataclass(frozen=True)
class LayerStatistics:
    """Means over the tensors of one block, weighted by their number of values."""

    layer: int
    total: float
    z_density: float
    cosine: float


@dataclass(frozen=True)
class ExpertHits:
    """How many tokens each expert of one tensor saw."""

    name: str
    layer: int | None
    hits: tuple[int, ...]  # by expert
    n_unseen: int
    n_below: int  # experts with fewer tokens than was asked about, unseen ones included
    share_below: float
    fewest: int
    median: int  # rounded down


@dataclass(frozen=True)
class ImatrixStatistics:
    """What an importance matrix holds, tensor by tensor."""

    dataset: str
    n_chunks: int
    chunk_size: int  # tokens; 0 where the format does not say
    tensors: tuple[TensorStatistics, ...]  # by kind of tensor, the largest total first
    layers: tuple[LayerStatistics, ...]
    empty: tuple[str, ...]  # tensors that no token reached
    below: int  # tokens; fewer count as few
    experts: tuple[ExpertHits, ...]
    uncounted: tuple[str, ...]  # tensors of experts without a count for each, as in a .dat file


def imatrix_statistics(imatrix: Imatrix, below: int) -> ImatrixStatistics:
    """All figures of a matrix; experts with fewer than `below` tokens are counted."""
    found: dict[str, TensorStatistics] = {}
    for name, entry in imatrix.entries.items():
        if (values := _mean_squares(entry)).size:
            found[name] = _statistics(name, values)
    tensors = [_with_cosine(one, imatrix, found) for one in found.values()]
    of_experts = [one for name, one in imatrix.entries.items() if is_of_experts(name)]
    counted = [one for one in of_experts if len(one.counts) > 1]
    return ImatrixStatistics(
        ", ".join(imatrix.datasets),
        imatrix.n_chunks,
        imatrix.chunk_size,
        tuple(sorted(tensors, key=lambda one: (tensor_kind(one.name), -one.total))),
        _layers(tensors),
        tuple(sorted(imatrix.entries.keys() - found.keys())),
        below,
        tuple(expert_hits(one, below) for one in sorted(counted, key=_place)),
        tuple(one.name for one in sorted(of_experts, key=_place) if len(one.counts) == 1),
    )


def tensor_kind(name: str) -> str:
    """What llama-imatrix calls a tensor: its name without block and `weight`.

    >>> tensor_kind("blk.3.attn_q.weight")
    'attn_q'
    """
    parts = name.split(".")
    at = parts.index("weight") if "weight" in parts[1:] else 0
    return parts[at - 1] if at else name


def _layer_of(name: str) -> int | None:
    match = _BLOCK.match(name)
    return None if match is None else int(match[1])


def _place(entry: ImatrixEntry) -> tuple[int, str]:
    layer = _layer_of(entry.name)
    return (-1 if layer is None else layer), entry.name


def _mean_squares(entry: ImatrixEntry) -> Doubles:
    """All mean squares of an entry in one row; float32 quotients, as they quantize."""
    seen = entry.counts > 0
    counts = entry.counts[seen].astype(np.float32)[:, None]
    return (entry.sums[seen] / counts).astype(np.float64).reshape(-1)


def _statistics(name: str, values: Doubles) -> TensorStatistics:
    total, mean = float(values.sum()), float(values.mean())
    # 0 for equal values, whose difference of sums may be anything small
    deviation = float(values.std()) if values.max() > values.min() else 0.0
    shares = values[values > 0] / total if total > 0 else values[:0]
    entropy = float(-(shares * np.log2(shares)).sum())
    most = math.log2(values.size)
    far = int((values > mean + deviation).sum()) if deviation > 0 else 0
    return TensorStatistics(
        name=name,
        layer=_layer_of(name),
        n_values=values.size,
        total=total,
        smallest=float(values.min()),
        largest=float(values.max()),
        mean=mean,
        deviation=deviation,
        active=float((values > _INACTIVE).mean()),
        entropy=entropy,
        entropy_share=entropy / most if most else 0.0,
        z_density=far / values.size,
    )


def _with_cosine(
    one: TensorStatistics, imatrix: Imatrix, found: dict[str, TensorStatistics]
) -> TensorStatistics:
    """The cosine is of raw sums, so experts weigh in it by their tokens."""
    if not one.layer:
        return one
    earlier = _BLOCK.sub(f"blk.{one.layer - 1}.", one.name)
    if earlier not in found:
        return one
    sums, before = (imatrix.entries[name].sums.astype(np.float64) for name in (one.name, earlier))
    lengths = float(np.linalg.norm(sums) * np.linalg.norm(before))
    if sums.shape != before.shape or not lengths:
        return one
    return replace(one, cosine=float((sums * before).sum()) / lengths)


def _layers(tensors: Iterable[TensorStatistics]) -> tuple[LayerStatistics, ...]:
    by_layer: dict[int, list[TensorStatistics]] = {}
    for one in tensors:
        if one.layer is not None:
            by_layer.setdefault(one.layer, []).append(one)
    return tuple(_layer(layer, own) for layer, own in sorted(by_layer.items()))


def _layer(layer: int, tensors: Sequence[TensorStatistics]) -> LayerStatistics:
    weights = [one.n_values for one in tensors]
    columns = ([one.total for one in tensors], [one.z_density for one in tensors])
    total, z_density = (float(np.average(column, weights=weights)) for column in columns)
    cosine = float(np.average([one.cosine for one in tensors], weights=weights))
    return LayerStatistics(layer, total, z_density, cosine)


def expert_hits(entry: ImatrixEntry, below: int) -> ExpertHits:
    """The tokens of the experts of one tensor."""
    return expert_hits_of(entry.name, entry.counts.tolist(), below)


def expert_hits_of(name: str, tokens: Sequence[int], below: int) -> ExpertHits:
    """The same of numbers of tokens, in the order of the experts."""
    n_below = sum(count < below for count in tokens)
    return ExpertHits(
        name,
        _layer_of(name),
        tuple(tokens),
        sum(count == 0 for count in tokens),
        n_below,
        n_below / len(tokens),
        min(tokens),
        int(np.median(tokens)),
    )
