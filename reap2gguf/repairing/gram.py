"""The normal equations of a layer's repair, (Phi^T Phi + lambda I) X = Phi^T E, in three ways.

The Gram matrix Phi^T Phi has as many rows as all kept experts have neurons: 49,152 for 64 experts
of 768. It is held on the computing device, held in host memory, or never formed, which takes the
least memory and the most time. All three give the same solution, up to rounding.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from reap2gguf.errors import ObservationError
from reap2gguf.repairing.features import Features, RoutedRows, product
from reap2gguf.repairing.gram_size import PIECE, TILE
from reap2gguf.repairing.solve import NotPositiveDefinite, Tiles, conjugate_gradients, solved


class Gram(ABC):
    """The normal equations of one layer."""

    def __init__(self, features: Features) -> None:
        self.features = features
        self.right = features.right_side()

    @property
    @abstractmethod
    def diagonal_mean(self) -> float:
        """The mean of the Gram matrix's diagonal, which lambda is relative to."""

    @abstractmethod
    def solve(self, shift: float, start: Tensor | None) -> Tensor | None:
        """X (E F, H) for a lambda; None if that cannot be computed.

        `start`: the solution for another lambda, which some ways make use of.
        """


class FormedGram(Gram):
    """The Gram matrix in tiles, on the device or in host memory."""

    def __init__(self, features: Features, store: torch.device) -> None:
        super().__init__(features)
        self._tiles = formed(features, store)

    @property
    def diagonal_mean(self) -> float:
        return self._tiles.diagonal_mean()

    def solve(self, shift: float, start: Tensor | None) -> Tensor | None:
        try:
            return solved(self._tiles, shift, self.right, self.features.each)
        except NotPositiveDefinite:
            return None  # lambda is too small for the precision of the tiles


class UnformedGram(Gram):
    """Products with the Gram matrix, computed from the rows each time."""

    def __init__(self, features: Features) -> None:
        super().__init__(features)
        self._blocks = features.own_blocks()

    @property
    def diagonal_mean(self) -> float:
        found = self._blocks.diagonal(dim1=1, dim2=2).double().sum()
        return float(found) / self.features.n_columns

    def solve(self, shift: float, start: Tensor | None) -> Tensor | None:
        blocks = self._blocks.clone()
        blocks.diagonal(dim1=1, dim2=2).add_(shift)

        def multiply(values: Tensor) -> Tensor:
            return self.features.normal(values).add_(values, alpha=shift)

        try:
            return conjugate_gradients(multiply, blocks, self.right, start)
        except NotPositiveDefinite:
            return None  # lambda is too small for the precision of the sums


def gram_of(features: Features, way: str) -> Gram:
    """The normal equations of a layer, held in one of `gram_size.WAYS`.

    Raises ObservationError if the layer has no rows.
    """
    if not features.n_rows:
        raise ObservationError("no token is left to repair a layer with; give more text")
    if way == "never":
        return UnformedGram(features)
    return FormedGram(features, features.device if way == "device" else torch.device("cpu"))


@torch.inference_mode()
def formed(features: Features, store: torch.device) -> Tiles:
    """Phi^T Phi in tiles of neighbouring experts."""
    groups, bounds = _groups(features)
    tiles = Tiles(bounds, features.device, store)
    is_here = store == features.device
    # all tiles at once, or one row of them at a time, which forms columns of Phi more than once
    parts = [range(len(groups))] if is_here else [range(i, i + 1) for i in range(len(groups))]
    for part in parts:
        sums: dict[tuple[int, int], Tensor] = {}
        for piece in _pieces(features):
            _add(features, piece, groups, part, sums)
        for place, total in sums.items():
            tiles[place] = total
    return tiles


def _add(
    features: Features,
    piece: RoutedRows,
    groups: list[range],
    part: range,
    sums: dict[tuple[int, int], Tensor],
) -> None:
    """Add what some rows contribute to the tiles whose row of tiles is in `part`."""
    columns = list(features.each(lambda g: features.dense(piece, g), groups[: part.stop]))
    places = [(i, j) for i in part for j in range(i + 1)]
    each = features.each(
        lambda place: product(columns[place[0]], columns[place[1]], features.work), places
    )
    for place, found in zip(places, each, strict=True):
        if place in sums:
            sums[place] += found
        else:
            sums[place] = found


def _groups(features: Features) -> tuple[list[range], list[slice]]:
    """Neighbouring experts that share a tile, and their columns."""
    width, count = features.experts.width, features.experts.n_experts
    step = max(1, TILE[features.device.type] // width)
    groups = [range(first, min(first + step, count)) for first in range(0, count, step)]
    return groups, [slice(group.start * width, group.stop * width) for group in groups]


def _pieces(features: Features) -> Iterator[RoutedRows]:
    """The rows in pieces that are formed at once."""
    size = PIECE[features.device.type]
    for rows in features.on_device():
        for first in range(0, len(rows), size):
            yield rows if len(rows) <= size else _cut(rows, first, min(first + size, len(rows)))


def _cut(rows: RoutedRows, first: int, last: int) -> RoutedRows:
    """Some rows of a batch."""
    top_k = rows.gates.shape[1]
    inside = (rows.order >= first * top_k) & (rows.order < last * top_k)
    ends = torch.tensor([0, *rows.ends], device=inside.device)
    before = torch.cat([inside.new_zeros(1, dtype=torch.int64), inside.cumsum(0)])
    return replace(
        rows,
        inputs=rows.inputs[first:last],
        gates=rows.gates[first:last],
        errors=rows.errors[first:last],
        order=rows.order[inside] - first * top_k,
        ends=tuple(before[ends[1:]].tolist()),
    )
