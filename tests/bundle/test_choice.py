"""The record of a choice, read and refused."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import pytest

from reap2gguf.bundle.choice import choice_of
from tests.choosing.records import candidate, choice

FOUND = choice(candidate("reap", 0.3, (0.0, 0.0)), candidate("ean_sum", 0.4, (0.1, 0.01), "reap"))


def values() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(json.dumps(asdict(FOUND)))
    return found


def test_what_is_read_is_what_was_written() -> None:
    assert choice_of(values()) == FOUND
    alone = choice(candidate("reap", 0.3, None))
    assert choice_of(json.loads(json.dumps(asdict(alone)))) == alone


@pytest.mark.parametrize(
    ("path", "wrong", "message"),
    [
        (("chosen",), "frequency", "not among the candidates"),
        (("chosen",), 3, "not a short text"),
        (("candidates",), [], "expected 1 to 64"),
        (("candidates",), {}, "expected 1 to 64"),
        (("candidates", 1, "name"), "reap", "names one twice"),
        (("candidates", 1, "same_as"), "frequency", "expected an earlier candidate"),
        (("candidates", 0, "same_as"), "reap", "expected an earlier candidate"),
        (("candidates", 0, "other"), None, "not measured on the texts"),
        (("candidates", 0, "held_out", "behind"), 0.5, "expected a figure"),
        (("candidates", 0, "held_out", "divergence", "value"), float("nan"), "expected a number"),
        (("held_out", "n_rows"), 0, "n_rows is 0, expected a count"),
        (("held_out", "n_rows"), True, "expected a count"),
        (("held_out", "label"), "x" * 999, "not a short text"),
        (("other",), None, "not measured on the texts"),
    ],
)
def test_other_values_are_refused(path: tuple[Any, ...], wrong: object, message: str) -> None:
    found = values()
    place = found
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = wrong
    with pytest.raises((TypeError, ValueError), match=message):
        choice_of(found)
