"""How far rows of a GGUF file may be from the weights: bounds for each 32 values of a row.

A bound for a whole matrix, or a whole row, would let lost rows or blocks hide among the many sound
ones. So the error of every 32 neighbouring values is compared with their own size, and with that of
the block of 256 whose scale they share:

    |read - stored| <= bound * sqrt(|stored|^2 + mean of |stored|^2 over the block)

Types round well within this. A few sound rows do not: sparse ones in types that have no zeros, or
columns that the importance matrix calls unimportant. Those are quantized again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

if TYPE_CHECKING:
    from reap2gguf.checkpoint.weights import Floats

# Quantized as quickly as they are read, and by no importance matrix: always compared by bytes.
EXACT_TYPES = frozenset(
    GGMLQuantizationType[name] for name in ("F32", "F16", "BF16", "Q8_0", "MXFP4")
)

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
}
_UNKNOWN_IMPORTANCE = 4.0  # times the bound, where it cannot be known what was unimportant
_MOST_UNKNOWN = 0.65  # of that, where the bound itself is not larger
_ZEROS = 0.5  # the bound for values that are read as zeros
_GROUP = 32
_MEASURABLE = (1e-30, 1e30)  # sums of squares that float32 holds without loss


@dataclass(frozen=True)
class RowErrors:
    """Which rows of a range are beyond the bounds of their type, and how far each row is."""

    suspicious: npt.NDArray[np.int64]  # numbers of rows
    bound: float


def measured_types() -> frozenset[str]:
    """Names of the types that have bounds."""
    return frozenset(_BOUNDS)


def suspicious_rows(
    found: Floats, stored: Floats, tensor_type: GGMLQuantizationType, knows_importance: bool
) -> npt.NDArray[np.int64]:
    """Numbers of the rows with values beyond the bound of their type.

    `found` is overwritten. Rows so small or large that float32 cannot square them are named too,
    if they are not equal.
    """
    n_rows = len(found)
    zero = ~found.reshape(n_rows, -1, _GROUP).any(axis=2)
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        found -= stored
        size = _squares(stored)
        error = _squares(found)
        group = size.reshape(n_rows, -1, _groups_per_block(tensor_type))
        scale = (group + group.mean(axis=2, keepdims=True)).reshape(n_rows, -1)
        limit = np.float32(bound_of(tensor_type, knows_importance) ** 2)
        limits = np.where(zero, np.minimum(limit, np.float32(_ZEROS**2)), limit)
        sound = error <= limits * scale  # false for NaN
        total = size.sum(axis=1)
    low, high = _MEASURABLE
    is_measured = (total > low) & (total < high)
    is_equal = np.zeros(n_rows, dtype=bool)
    is_equal[~is_measured] = ~found[~is_measured].any(axis=1)
    return np.flatnonzero(~np.where(is_measured, sound.all(axis=1), is_equal))


def bound_of(tensor_type: GGMLQuantizationType, knows_importance: bool) -> float:
    """The largest error of 32 values, relative to their size and their block's."""
    bound = _BOUNDS[tensor_type.name]
    if knows_importance:
        return bound
    return max(bound, min(bound * _UNKNOWN_IMPORTANCE, _MOST_UNKNOWN))


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


def _groups_per_block(tensor_type: GGMLQuantizationType) -> int:
    return max(1, int(GGML_QUANT_SIZES[tensor_type][0]) // _GROUP)


def _squares(values: npt.NDArray[np.floating]) -> npt.NDArray[np.floating]:
    """Sums of squares of each 32 values of rows: (rows, columns / 32)."""
    groups = values.reshape(len(values), -1, _GROUP)
    sums: npt.NDArray[np.floating] = np.einsum("rgv,rgv->rg", groups, groups)
    return sums
