"""Rows of a calibration that the observation does not read, so that candidates are measured fairly.

One row in eight is held out, but no more than give 32,768 tokens: criteria differ by far more than
the error of as many, and every row that is held out is one less to rank experts by. The rows are
spread evenly over the calibration, since neighbours in a text may all be of one kind. That depends
on the rows alone: the same calibration holds out the same rows, for any model and any ratio.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from reap2gguf.artifacts.texts import ObservationRows, hash_rows
from reap2gguf.choosing.amounts import MOST_HELD_TOKENS, ONE_IN
from reap2gguf.errors import CalibrationError

if TYPE_CHECKING:
    from reap2gguf.artifacts.texts import Row

_LEAST_HELD = 2  # an error needs more than one
_LEAST_ROWS = _LEAST_HELD + 1


@dataclass(frozen=True)
class Split:
    """The rows that are observed, with a hash of their own, and those that are held out."""

    seen: ObservationRows
    held: Sequence[Row]


def hold_out(rows: ObservationRows) -> Split:
    """Divide the rows of a calibration. Raises CalibrationError for fewer than three rows."""
    n_rows = len(rows.rows)
    if n_rows < _LEAST_ROWS:
        raise CalibrationError(
            f"calibration {rows.label!r}: {n_rows} rows, but to choose a method by measuring needs "
            f"at least {_LEAST_ROWS}, of which {_LEAST_HELD} are held out; use more --samples or a "
            "smaller --max-length, or name a --method"
        )
    numbers = set(held_numbers([len(row) for row in rows.rows]))
    seen = [row for number, row in enumerate(rows.rows) if number not in numbers]
    digest = hashlib.sha256(f"{rows.sha256}, some held out".encode())
    hash_rows(digest, seen)
    held = [row for number, row in enumerate(rows.rows) if number in numbers]
    return Split(replace(rows, rows=seen, sha256=digest.hexdigest()), held)


def held_numbers(lengths: Sequence[int]) -> list[int]:
    """The numbers of the rows that are held out, ascending, given the tokens of every row."""
    n_rows = len(lengths)
    enough = -(
        -MOST_HELD_TOKENS * n_rows // max(1, sum(lengths))
    )  # rows with MOST_HELD_TOKENS, on average
    n_held = max(_LEAST_HELD, min(n_rows // ONE_IN, enough))
    return [(2 * number + 1) * n_rows // (2 * n_held) for number in range(n_held)]
