"""Whether a value is right, as EvalPlus decides it.

Source: `unsafe_execute` in evalplus/eval (https://github.com/evalplus/evalplus). Standard library
alone.
"""

from __future__ import annotations

import cmath
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

_RELATIVE = 1e-7  # numpy.testing.assert_allclose's
_FOR_FLOATS = 1e-6  # where the problem states no tolerance


class Differing:
    """The comparison for one problem: `oracle` is "equal" or a key of the rules below."""

    def __init__(self, oracle: str, tolerance: float) -> None:
        self._rule = _RULES[oracle]
        self._replaces = oracle in _WHOLE
        self._tolerance = tolerance

    def is_right(self, arguments: Sequence[Any], found: Any, expected: Any) -> bool:
        """Whether what the function returned for the arguments is what was expected.

        May raise whatever a comparison of two values raises.
        """
        if self._replaces:
            return self._rule(arguments, found, expected, self._tolerance)
        is_right = self._rule(arguments, found, expected, self._tolerance)
        if self._tolerance == 0 and _is_of_floats(expected):
            self._tolerance = _FOR_FLOATS  # and it is so for the inputs that follow
        if is_right or self._tolerance == 0:
            return is_right
        if type(found) is not type(expected):
            return False
        return _is_close(found, expected, self._tolerance)


def _is_of_floats(value: Any) -> bool:
    if isinstance(value, list | tuple) and value:
        return all(isinstance(one, float) for one in value)
    return isinstance(value, float)


def _is_close(found: Any, expected: Any, tolerance: float) -> bool:
    """As numpy.allclose for numbers, and for lists and tuples of them of the same shape."""
    if isinstance(found, list | tuple) and isinstance(expected, list | tuple):
        return len(found) == len(expected) and all(
            _is_close(one, other, tolerance) for one, other in zip(found, expected, strict=True)
        )
    if not isinstance(found, int | float | complex) or not isinstance(
        expected, int | float | complex
    ):
        return False
    if found == expected:  # infinities, too
        return True
    if not cmath.isfinite(found) or not cmath.isfinite(expected):
        return False
    return abs(found - expected) <= tolerance + _RELATIVE * abs(expected)


def _is_equal(arguments: Any, found: Any, expected: Any, tolerance: float) -> bool:
    return bool(found == expected)


def _is_root(arguments: Any, found: Any, expected: Any, tolerance: float) -> bool:
    """HumanEval/32: any root of the polynomial, whose coefficients begin with the constant.

    evalplus 0.3.1 calls no answer of this problem right, not even its own
    (https://github.com/evalplus/evalplus/pull/201); its scores are up to 1 / 164 lower.
    """
    value = sum(one * math.pow(found, power) for power, one in enumerate(arguments[0]))
    return bool(abs(value) <= tolerance)


def _is_same_set(arguments: Any, found: Any, expected: Any, tolerance: float) -> bool:
    return set(found) == set(expected)


def _is_something(arguments: Any, found: Any, expected: Any, tolerance: float) -> bool:
    """Right is a match object or None, whatever stands for them."""
    if isinstance(found, bool):
        return found == (expected is not None)
    return (expected is not None) == (found is not None)


def _is_anything(arguments: Any, found: Any, expected: Any, tolerance: float) -> bool:
    return True


def _is_equal_or_zero(arguments: Any, found: Any, expected: Any, tolerance: float) -> bool:
    return bool(found == expected or found == 0)


def _is_surface(arguments: Any, found: Any, expected: Any, tolerance: float) -> bool:
    """Mbpp/581: `height` may be that of the pyramid or of its sides."""
    base, height = arguments
    slanted = math.hypot(base / 2, height)
    other = round(base**2 + 2 * base * slanted)
    return bool(found == expected or abs(found - other) <= tolerance)


def _is_distance(arguments: Any, found: Any, expected: Any, tolerance: float) -> bool:
    """Mbpp/558: the shorter number may be filled with zeros."""
    one, other = map(str, arguments)
    width = max(len(one), len(other))
    pairs = zip(one.zfill(width), other.zfill(width), strict=True)
    return bool(found == expected or found == sum(abs(int(a) - int(b)) for a, b in pairs))


_Rule = Callable[[Any, Any, Any, float], bool]
_RULES: Mapping[str, _Rule] = {
    "equal": _is_equal,
    "root": _is_root,
    "set": _is_same_set,
    "something": _is_something,
    "anything": _is_anything,
    "equal or zero": _is_equal_or_zero,
    "surface": _is_surface,
    "distance": _is_distance,
}
_WHOLE = ("root",)  # nothing else is compared
# functions of MBPP+ that have a rule of their own, by name
BY_FUNCTION: Mapping[str, Mapping[str, str]] = {
    "humaneval": {"find_zero": "root"},
    "mbpp": {
        "are_equivalent": "anything",
        "sum_div": "equal or zero",
        "surface_Area": "surface",
        "digit_distance_nums": "distance",
    },
}
