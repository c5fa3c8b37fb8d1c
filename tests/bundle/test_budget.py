"""Records of how a size was divided, from JSON that anyone may have written."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any

import pytest

from reap2gguf.bundle.budget import BudgetRecord, CountRecord, budget_of_json

RECORD = BudgetRecord(
    "a file of 12 GiB",
    "reap",
    "held-out",
    "0" * 64,
    4080,
    (
        CountRecord(8, 0.0, 0.0, None, None, None, "does not fit"),
        CountRecord(6, 0.25, 0.01, 0.5, 4.5, 1000),
        CountRecord(4, 0.5, 0.02, 0.25, 6.5, 990),
    ),
)


def as_json(record: BudgetRecord) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(json.dumps(asdict(record)))
    return values


def test_a_record_comes_back_and_the_most_experts_win_a_tie() -> None:
    assert budget_of_json(as_json(RECORD)) == RECORD
    assert RECORD.best.n_experts == 6
    assert RECORD.counts[0].damage == float("inf")
    fewer = replace(RECORD.counts[2], quantizing=0.2)
    assert replace(RECORD, counts=(*RECORD.counts[:2], fewer)).best.n_experts == 4


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("counts",), [], "counts is"),
        (("counts",), None, "counts is"),
        (("counts", 1, "n_experts"), 0, "n_experts is 0, expected a count"),
        (("counts", 1, "n_experts"), True, "n_experts is True"),
        (("counts", 1, "n_experts"), 9, "expected descending numbers"),
        (("counts", 1, "pruning"), float("nan"), "pruning is nan"),
        (("counts", 1, "quantizing"), None, "only some of quantizing"),
        (("counts", 1, "quantizing"), 2**70, "quantizing is"),
        (("counts", 1, "problem"), 7, "problem is 7"),
        (("target",), "x" * 3000, "target is"),
        (("n_scored",), 1.5, "n_scored is 1.5"),
    ],
)
def test_what_is_no_record(place: tuple[Any, ...], value: Any, message: str) -> None:
    values = as_json(RECORD)
    found: Any = values
    for step in place[:-1]:
        found = found[step]
    found[place[-1]] = value
    with pytest.raises((TypeError, ValueError), match=message):
        budget_of_json(values)


def test_one_that_fits_nothing() -> None:
    values = as_json(replace(RECORD, counts=RECORD.counts[:1]))
    with pytest.raises(ValueError, match="names none that fits"):
        budget_of_json(values)
