"""Values that cross between two processes, and what is no value."""

from __future__ import annotations

import collections
import json
import math
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reap2gguf.evaluating.generation.sandbox.values import (
    BrokenFrameError,
    Opaque,
    decode,
    encode,
    frame,
    parsed,
)

HASHABLE = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**200), 2**200),
    st.floats(allow_nan=False),
    st.text(),
    st.binary(max_size=8),
    st.complex_numbers(allow_nan=False),
    st.fractions(),
)
VALUES = st.recursive(
    HASHABLE,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.sets(HASHABLE, max_size=4),
        st.frozensets(HASHABLE, max_size=4),
        st.dictionaries(HASHABLE, inner, max_size=4),
    ),
)


def crossed(value: Any) -> Any:
    return decode(parsed(json.dumps(encode(value)).encode()))


@given(VALUES)
def test_values_cross(value: Any) -> None:
    found = crossed(value)
    assert found == value
    assert type(found) is type(value)


Point = collections.namedtuple("Point", "x y")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (collections.Counter("aab"), {"a": 2, "b": 1}),
        (collections.OrderedDict(a=1), {"a": 1}),
        (Point(1, 2), (1, 2)),
        ({"a": 1}.keys(), {"a"}),
        (range(3, 9, 2), range(3, 9, 2)),
        (np.int64(4), 4),
        (np.float32(0.5), 0.5),
        (np.bool_(True), True),
        (Decimal("1.5"), Decimal("1.5")),
        (Fraction(1, 3), Fraction(1, 3)),
        (bytearray(b"x"), b"x"),
        (float("inf"), math.inf),
    ],
)
def test_subclasses_become_what_they_equal(value: Any, expected: Any) -> None:
    assert crossed(value) == expected


def test_iterators_and_others() -> None:
    assert list(crossed(one * 2 for one in (1, 2))) == [2, 4]
    assert crossed(iter([1])) != [1]
    assert math.isnan(crossed(math.nan))
    other = crossed(object())
    assert isinstance(other, Opaque)
    assert other != other
    assert bool(other)
    with pytest.raises(ValueError, match="more than"):
        encode(iter(int, 1))


@pytest.mark.parametrize(
    "value",
    [
        {}, [], ["list"], ["list", 1], ["other", []], ["int", "x"], ["int", True], [1, 2],
        ["set", [["list", []]]], ["fraction", ["0x1", "0x0"]], ["dict", [[1]]], ["range", []],
        ["complex", [1]], ["object", 1], ["decimal", "x"], ["bytes", "xx"], [["list"], []],
        ["range", ["0x0", "0x1", "0x0"]],
    ],
)  # fmt: skip
def test_what_is_no_value(value: Any) -> None:
    with pytest.raises(BrokenFrameError):
        decode(value)


def test_frames_have_bounds() -> None:
    with pytest.raises(BrokenFrameError, match="at most"):
        frame("x" * 2**26)
    for text in (b"[" * 100_000, b"{", b"\xff"):
        with pytest.raises(BrokenFrameError):
            parsed(text)
