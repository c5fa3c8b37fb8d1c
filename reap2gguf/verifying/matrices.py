"""How far the rows of a GGUF file are from the weights, and how far they may be.

A bound for a whole matrix, or a whole row, would let lost rows or blocks hide among the many sound
ones. So the error of every 32 neighbouring values is compared with their own size, and with that of
the block of 256 whose scale they share:

    |read - stored| <= bound * sqrt(|stored|^2 + mean of |stored|^2 over the block)

Types round well within this. A few sound rows do not: sparse ones in types that have no zeros, or
columns that the importance matrix calls unimportant. Those are quantized again. What quantizing
again cannot find is a fault of the quantizer, so whole ranges have a bound of their own as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType

from reap2gguf.gguf_files.tensor_types import block_of

if TYPE_CHECKING:
    from reap2gguf.checkpoint.weights import Floats

# Largest error of 32 values, as above: about one and a half times the largest that trained weights
# showed, with importance that spreads over four orders of magnitude. What is lost or zero has 0.7,
# a doubled scale 0.7, another row 1, a changed sign 1.4.
_BOUNDS = {
    "Q6_K": 0.04,
    "Q5_K": 0.08,
    "Q5_1": 0.08,
    "Q5_0": 0.09,
    "Q4_K": 0.14,
    "Q4_1": 0.13,
    "Q4_0": 0.18,
    "IQ4_XS": 0.15,
    "IQ4_NL": 0.15,
    "Q3_K": 0.28,
    "Q2_K": 0.46,
    "IQ3_S": 0.5,
    "IQ3_XXS": 0.5,
    "IQ2_S": 0.65,
    "IQ2_XS": 0.65,
    "IQ2_XXS": 0.95,
    "IQ1_M": 0.93,
    "IQ1_S": 0.95,
    "IQ6_K": 0.05,
    "IQ5_K": 0.1,
    "IQ5_KS": 0.1,
    "IQ4_K": 0.18,
    "IQ4_KS": 0.2,
    "IQ4_KSS": 0.35,
    "IQ4_KT": 0.3,
    "IQ3_K": 0.4,
    "IQ3_KS": 0.5,
    "IQ3_KT": 0.5,
    "IQ2_KL": 0.5,
    "IQ2_K": 0.95,
    "IQ2_KS": 0.95,
    "IQ2_KT": 0.95,
    "IQ1_KT": 0.95,
}
_UNKNOWN_IMPORTANCE = 4.0  # times the bound, where it cannot be known what was unimportant
_MOST_UNKNOWN = 0.65  # of that
# A vector of a codebook may have other signs than what is unimportant, or be zero. Then the bound
# is loose, and only a whole row of zeros is suspicious.
_CODEBOOKS = ("IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S")
_MOST_OF_CODEBOOKS = 1.7
_ZEROS = 0.5  # the bound for values that are read as zeros
_GROUP = 32
_MEASURABLE = (1e-30, 1e30)  # sums of squares that float32 holds without loss
_SPARSE = 0.5  # share of zeros

# Largest relative error |read - stored| / |stored| of a range of rows: about two and a half times
# what trained weights show, and for types of few bits, what a few outliers may cost. Another
# expert's weights have about 1.4, lost ones 1.
_RANGE_BOUNDS = {
    "F32": 1e-6,  # but for last bits of exponentials, its bytes are equal
    "F16": 0.05,  # of small values, which F16 rounds more
    "BF16": 0.004,
    "Q8_0": 0.02,
    "Q6_K": 0.05,
    "Q5_K": 0.1,
    "Q5_0": 0.12,
    "Q5_1": 0.12,
    "Q4_K": 0.2,
    "Q4_0": 0.22,
    "Q4_1": 0.22,
    "IQ4_XS": 0.2,
    "IQ4_NL": 0.2,
    "MXFP4": 0.3,
}
_RANGE_BOUND = 0.95  # of other types
_SURELY = 0.999  # of a bound, so that no order of sums matters


@dataclass(frozen=True)
class RowErrors:
    """How far a range of rows is from what is stored, in each group of 32 neighbouring values.

    Memory: the difference of the range, and a number for each group.
    """

    difference: Floats  # (rows, columns)
    size: Floats  # (rows, groups): sums of squares of what is stored
    error: Floats  # (rows, groups): sums of squares of the difference
    is_zero: npt.NDArray[np.bool_]  # (rows, groups): whether the file has zeros

    @classmethod
    def of(cls, found: Floats, stored: Floats) -> RowErrors:
        with np.errstate(over="ignore", invalid="ignore", under="ignore"):
            difference = found - stored
            is_zero: npt.NDArray[np.bool_] = np.logical_not(_groups(found).any(axis=2))
            return cls(difference, _squares(stored), _squares(difference), is_zero)

    def suspicious(
        self, tensor_type: GGMLQuantizationType, knows_importance: bool
    ) -> npt.NDArray[np.int64]:
        """Numbers of the rows with values beyond the bound of their type.

        Rows so small or large that float32 cannot square them are named too, if they differ.
        """
        n_rows = len(self.size)
        per_block = max(1, block_of(tensor_type)[0] // _GROUP)
        with np.errstate(over="ignore", invalid="ignore", under="ignore"):
            block = self.size.reshape(n_rows, -1, per_block)
            scale = (block + block.mean(axis=2, keepdims=True)).reshape(n_rows, -1)
            limit = np.float32(bound_of(tensor_type, knows_importance) ** 2)
            is_zero = self.is_zero
            if tensor_type.name in _CODEBOOKS and not knows_importance:
                is_zero = np.broadcast_to(is_zero.all(axis=1, keepdims=True), is_zero.shape)
            limits = np.where(is_zero, np.minimum(limit, np.float32(_ZEROS**2)), limit)
            sound = (self.error <= limits * scale).all(axis=1)  # false for NaN
            total = self.size.sum(axis=1)
        low, high = _MEASURABLE
        unmeasured = ~((total > low) & (total < high))
        sound[unmeasured] = ~self.difference[unmeasured].any(axis=1)
        return np.flatnonzero(~sound)

    def relative(self) -> float:
        """|read - stored| / |stored| of the whole range; NaN if it cannot be measured."""
        with np.errstate(over="ignore", invalid="ignore"):
            total, error = (float(sums.sum(dtype=np.float64)) for sums in (self.size, self.error))
        low, high = _MEASURABLE
        return (error / total) ** 0.5 if low < total < high else float("nan")


def is_beyond_its_type(
    errors: RowErrors, stored: Floats, tensor_type: GGMLQuantizationType
) -> bool:
    """Whether a range as a whole errs more than its type does, although its bytes can be made."""
    if not errors.relative() > range_bound(tensor_type):
        return False
    # types of few bits have no zeros: an identity matrix errs more, and is sound
    return int(np.count_nonzero(stored)) > _SPARSE * stored.size


def is_within_its_type(
    found: Floats,
    stored: Floats,
    tensor_type: GGMLQuantizationType,
    firsts: Sequence[int] = (0,),
) -> bool:
    """Whether ranges of rows are so near to what is stored that `is_beyond_its_type` is false.

    `firsts` are the numbers of each range's first row. This costs little; where it is false, the
    ranges have to be looked at one by one. Memory: the difference of all rows.
    """
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        sums = [
            np.add.reduceat(np.einsum("rv,rv->r", rows, rows), firsts, dtype=np.float64)
            for rows in (stored, found - stored)
        ]
        limit = (range_bound(tensor_type) * _SURELY) ** 2
        near = sums[1] <= limit * sums[0]  # false for NaN
    low, high = _MEASURABLE
    return bool((near & (low < sums[0]) & (sums[0] < high)).all())


def range_bound(tensor_type: GGMLQuantizationType) -> float:
    """The largest relative error of a range of rows."""
    return _RANGE_BOUNDS.get(tensor_type.name, _RANGE_BOUND)


def bound_of(tensor_type: GGMLQuantizationType, knows_importance: bool) -> float:
    """The largest error of 32 values, relative to their size and their block's."""
    bound = _BOUNDS[tensor_type.name]
    if knows_importance:
        return bound
    if tensor_type.name in _CODEBOOKS:
        return _MOST_OF_CODEBOOKS
    return min(bound * _UNKNOWN_IMPORTANCE, _MOST_UNKNOWN)


def errs_no_more(found: Floats, again: Floats, stored: Floats, slack: float) -> bool:
    """Whether each 32 values of rows err at most `slack` times as much as in another quantizing."""
    largest = max(float(np.abs(stored).max(initial=0)), float(np.abs(found).max(initial=0)))
    if largest == 0:
        return True
    unit = np.float64(largest)  # so that squares neither overflow nor vanish
    error, other = (_squares((values - stored) / unit) for values in (found, again))
    return bool((error <= slack**2 * other + 1e-12).all())


def relative_error(found: Floats, stored: Floats) -> float:
    """|found - stored| / |stored|, or |found| if nothing is stored."""
    with np.errstate(over="ignore", invalid="ignore"):
        scale = float(np.linalg.norm(stored.astype(np.float64)))
        distance = float(np.linalg.norm(found.astype(np.float64) - stored))
    return distance / scale if scale else distance


def _groups(values: npt.NDArray[np.floating]) -> npt.NDArray[np.floating]:
    """Rows as groups of 32 values; whole rows where they are no multiple of that."""
    n_rows, n_columns = values.shape
    return values.reshape(n_rows, -1, n_columns if n_columns % _GROUP else _GROUP)


def _squares(values: npt.NDArray[np.floating]) -> npt.NDArray[np.floating]:
    """Sums of squares of each group of rows: (rows, groups)."""
    groups = _groups(values)
    sums: npt.NDArray[np.floating] = np.einsum("rgv,rgv->rg", groups, groups)
    return sums
