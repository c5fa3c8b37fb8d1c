"""When EvalPlus calls a value right."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from reap2gguf.evaluating.generation.sandbox.comparing import BY_FUNCTION, Differing


@pytest.mark.parametrize(
    ("found", "expected", "tolerance"),
    [
        (1.0, 1.0 + 1e-7, 0),
        (1.0, 1.0 + 1e-4, 0),
        (1, 1.0, 0),
        (1, 1.0 + 1e-9, 0),
        ([0.1, 0.2], [0.1, 0.2000001], 0),
        ([0.1], [0.1, 0.2], 0),
        ((0.1,), [0.1], 0),
        ([1, 2], [1, 2], 0),
        ([1, 2], [1, 3], 0),
        ("a", "a", 0),
        ("a", "b", 1e-6),
        (None, 1.0, 0),
        (5.0, 5.05, 0.1),
        ([[1.0, 2.0]], [[1.0, 2.00000001]], 1e-6),
        (math.inf, math.inf, 1e-6),
        (math.nan, math.nan, 1e-6),
        (True, 1, 0),
    ],
)
def test_values_are_compared_as_by_numpy(found: Any, expected: Any, tolerance: float) -> None:
    assert Differing("equal", tolerance).is_right([], found, expected) == by_evalplus(
        found, expected, tolerance
    )


def by_evalplus(found: Any, expected: Any, tolerance: float) -> bool:
    """The rules of `unsafe_execute`, with numpy."""
    floats = [expected] if isinstance(expected, float) else expected
    is_of_floats = isinstance(floats, list | tuple) and bool(floats)
    if tolerance == 0 and is_of_floats and all(isinstance(one, float) for one in floats):
        tolerance = 1e-6
    if found == expected or tolerance == 0:
        return bool(found == expected)
    if type(found) is not type(expected):
        return False
    if isinstance(expected, list | tuple) and len(found) != len(expected):
        return False
    try:
        return bool(np.allclose(found, expected, rtol=1e-7, atol=tolerance))
    except TypeError:
        return False


def right(oracle: str, arguments: list[Any], found: Any, expected: Any) -> bool:
    return Differing(oracle, 1e-4).is_right(arguments, found, expected)


def test_rules_of_single_functions() -> None:
    # x^2 - 3x + 2 has the roots 1 and 2
    assert right("root", [[2, -3, 1]], 2.0, 1.0)
    assert not right("root", [[2, -3, 1]], 1.5, 1.0)
    assert right("set", [], [1, 2, 2], (2, 1))
    assert not right("set", [], [1], (2, 1))
    assert right("something", [], True, "match")
    assert right("something", [], "text", "match")
    assert not right("something", [], None, "match")
    assert right("something", [], False, None)
    assert right("anything", [], "x", 1)
    assert right("equal or zero", [], 0, 7)
    assert not right("equal or zero", [], 1, 7)
    # base 3 and height 4: sides as high as that, or a pyramid as high
    assert right("surface", [3, 4], 33, 33)
    assert right("surface", [3, 4], 35, 33)
    assert not right("surface", [3, 4], 34, 33)
    assert right("distance", [23, 156], 7, 8)  # 023 and 156: 1 + 3 + 3
    assert right("distance", [23, 156], 8, 8)
    assert not right("distance", [23, 156], 6, 8)


def test_every_rule_has_a_name() -> None:
    for rules in BY_FUNCTION.values():
        for rule in rules.values():
            Differing(rule, 0.0)
