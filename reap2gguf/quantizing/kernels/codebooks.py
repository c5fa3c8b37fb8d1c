"""The codebooks of IQ2 and IQ3, as the kernels read them: learned from ggml, not copied.

Such a type stores a group of four or eight levels as the number of a point of its grid. A group
that is no point becomes one of its neighbours. Which points there are is read from ggml itself, by
dequantizing blocks that hold each number; the neighbours follow from them by ggml's rule
(iq2xs_init_impl and iq3xs_init_impl in ggml-quants.c, MIT licence): the points at the nearest few
distances, sorted by distance, then by number.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from reap2gguf.errors import DependencyError

if TYPE_CHECKING:
    from reap2gguf.ggml import Ggml

CHUNK = 16  # codes that the kernels compare at a time; lists are filled up to whole chunks
_COUNT_BITS = 10  # of a place, for how many neighbours there are
_ON_GRID = -(2**31)
_UNUSED = np.iinfo(np.int32).max  # no group of levels has this code


Tables = ctypes.Array[ctypes.c_void_p]  # what a kernel is given of a codebook


@dataclass(frozen=True)
class _Form:
    """How a type spells the number of a point, and which neighbours it looks at."""

    n_points: int
    group: int  # levels that a point has
    level_bits: int
    n_distances: int  # how many of the nearest distances its neighbours have
    high_byte: int  # where a block keeps the upper bits of its first point's number
    unit: int  # what a block of scale 1 has to be multiplied by for its entries' sizes


_FORMS = {
    GGMLQuantizationType.IQ3_S: _Form(512, 4, 3, 3, 66, 1),
    GGMLQuantizationType.IQ3_XXS: _Form(256, 4, 3, 2, 66, 4),
    GGMLQuantizationType.IQ2_S: _Form(1024, 8, 2, 1, 66, 8),
    GGMLQuantizationType.IQ2_XS: _Form(512, 8, 2, 2, 3, 8),
    GGMLQuantizationType.IQ2_XXS: _Form(256, 8, 2, 2, 3, 8),
}
_LOW_BYTE = 2  # after the scale, in all of them


def entries_shape(tensor_type: GGMLQuantizationType) -> tuple[int, int] | None:
    """Points of a type's codebook, and the values that each stands for; None if it has none."""
    form = _FORMS.get(tensor_type)
    return None if form is None else (form.n_points, form.group)


@dataclass(frozen=True)
class Codebook:
    """A type's points and neighbours. A group's code is its levels, the first in the lowest bits.

    `places` has one number for each code: that of a point is negative, and its lowest 16 bits are
    the point's number; another's is first chunk of `codes` * 1024 + number of neighbours. `codes`
    are the neighbours' codes, nearest first, the nearest again where a chunk has room left.
    """

    places: npt.NDArray[np.int32]
    codes: npt.NDArray[np.uint16]
    # `entries_shape`: the sizes that points stand for, which dequantizing needs
    entries: npt.NDArray[np.uint8]

    def pointers(self) -> Tables:
        """What the kernels are given: `struct Codebook` of codebooks.h. Valid as long as this."""
        return (ctypes.c_void_p * 2)(self.places.ctypes.data, self.codes.ctypes.data)


@cache
def codebook(ggml: Ggml, tensor_type: GGMLQuantizationType) -> Codebook | None:
    """The codebook of a type, made once; None if it has none. Takes some tenths of a second.

    Raises DependencyError if what this libggml dequantizes is no such grid.
    """
    form = _FORMS.get(tensor_type)
    if form is None:
        return None
    points, entries = _points(ggml, tensor_type, form)
    bits = form.level_bits * np.arange(form.group)
    point_codes = (points.astype(np.int32) << bits).sum(axis=1)
    groups = np.indices((int(points.max()) + 1,) * form.group).reshape(form.group, -1).T
    codes = (groups << bits).sum(axis=1)
    places = np.full(1 << form.group * form.level_bits, _UNUSED, dtype=np.int32)
    places[point_codes] = _ON_GRID + np.arange(form.n_points)
    off_grid = places[codes] == _UNUSED
    counts, neighbours = _neighbours(groups[off_grid], points, form.n_distances)
    chunks = -(-counts // CHUNK)
    firsts = np.cumsum(chunks) - chunks
    places[codes[off_grid]] = (firsts << _COUNT_BITS) + counts  # no list is longer than the grid
    starts = np.cumsum(counts) - counts
    lists = np.repeat(neighbours[starts], chunks * CHUNK)  # all places have the nearest at first
    targets = np.arange(counts.sum()) + np.repeat(firsts * CHUNK - starts, counts)
    lists[targets] = neighbours
    return Codebook(places, point_codes[lists].astype(np.uint16), entries)


def _points(
    ggml: Ggml, tensor_type: GGMLQuantizationType, form: _Form
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8]]:
    """The levels (points, group) of a grid and their sizes, from blocks that hold one number."""
    numbers = np.arange(form.n_points)
    blocks = np.zeros((form.n_points, GGML_QUANT_SIZES[tensor_type][1]), dtype=np.uint8)
    blocks[:, :2] = np.array([1.0], dtype=np.float16).view(np.uint8)
    blocks[:, _LOW_BYTE] = numbers & 255
    blocks[:, form.high_byte] |= (numbers >> 8).astype(np.uint8)
    values = ggml.dequantize(blocks, tensor_type)[:, : form.group]
    found, levels = np.unique(values, return_inverse=True)
    levels = levels.reshape(values.shape)
    n_levels = 8 if form.level_bits == 3 else 3
    if len(found) != n_levels or len(np.unique(levels, axis=0)) != form.n_points:
        raise DependencyError(
            f"{ggml.path}: {tensor_type.name} has {len(found)} different magnitudes in its grid, "
            f"expected {n_levels} in {form.n_points} different points; "
            "install libggml-python>=0.20.2"
        )
    return levels, (values * form.unit).astype(np.uint8)


def _neighbours(
    groups: npt.NDArray[np.int64], points: npt.NDArray[np.int64], n_distances: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """For each group, how many neighbours it has; and the numbers of all, group after group."""
    a, b = groups.astype(np.float32), points.astype(np.float32)  # small integers: exact
    squares = (a * a).sum(axis=1)[:, None] + (b * b).sum(axis=1) - 2 * (a @ b.T)
    limit = squares.min(axis=1, keepdims=True)
    for _ in range(n_distances - 1):
        limit = np.where(squares > limit, squares, np.inf).min(axis=1, keepdims=True)
    which, numbers = np.nonzero(squares <= limit)
    order = np.lexsort((numbers, squares[which, numbers], which))
    return np.bincount(which, minlength=len(groups)), numbers[order]
