"""Plain Python values as JSON: what crosses between a candidate's process and its judge.

Nothing that arrives can run code: no pickle, no classes of the other side. Subclasses of plain
types, such as a Counter, become the plain type that they equal. What is none of them becomes an
`Opaque`, which equals nothing. Standard library alone; both processes import this.
"""

from __future__ import annotations

import itertools
import json
import os
import struct
from collections.abc import Callable, Iterator, KeysView, Mapping, Sequence, Set
from decimal import Decimal
from fractions import Fraction
from numbers import Integral, Real
from typing import Any

LENGTH = struct.Struct(">I")
MAX_FRAME = 64 * 2**20  # bytes of a frame; a longer one is an answer that no test expects
_MOST_ITEMS = 2**20  # that are taken out of an iterator, which may never end
_SMALL = 2**62
_PLAIN = frozenset((str, int, float, bool, type(None)))


class BrokenFrameError(Exception):
    """What arrived is not a value of this module."""


class Opaque:
    """A value of the other process that is no plain one. It equals nothing, not even itself."""

    def __init__(self, name: str, is_true: bool) -> None:
        self._name = name
        self._is_true = is_true

    def __eq__(self, other: object) -> bool:
        return False

    def __bool__(self) -> bool:
        return self._is_true

    def __repr__(self) -> str:
        return f"<{self._name}>"

    __hash__ = object.__hash__


def encode(value: Any) -> Any:
    """A value as what JSON has. Runs methods of the value, which may raise anything."""
    kind = type(value)
    if kind is int:
        return value if _is_small(value) else ["int", hex(value)]
    if kind in _PLAIN:
        return value
    for base, name, taken in _KINDS:
        if isinstance(value, base):
            return [name, taken(value)]
    if hasattr(value, "dtype") and hasattr(value, "item") and getattr(value, "shape", None) == ():
        return encode(value.item())  # numpy's numbers
    return ["object", [kind.__name__[:100], bool(value)]]


def _is_small(value: int) -> bool:
    return -_SMALL < value < _SMALL


def _items(values: Any) -> Any:
    found = list(itertools.islice(values, _MOST_ITEMS + 1))
    if len(found) > _MOST_ITEMS:
        raise ValueError(f"more than {_MOST_ITEMS:,} values")
    if all(type(one) in _PLAIN and (type(one) is not int or _is_small(one)) for one in found):
        return found
    return [encode(one) for one in found]


def _pairs(values: Mapping[Any, Any]) -> Any:
    return [[encode(key), encode(value)] for key, value in values.items()]


# The order counts: True is an int, a named tuple is a tuple, a Fraction is a Real.
_KINDS: Sequence[tuple[Any, str, Callable[[Any], Any]]] = (
    (bool, "bool", bool),
    (str, "str", lambda value: str.__str__(value)),
    (Integral, "int", lambda value: hex(int(value))),
    (list, "list", _items),
    (tuple, "tuple", _items),
    (frozenset, "frozenset", _items),
    ((set, KeysView, Set), "set", _items),
    (dict, "dict", _pairs),
    ((bytes, bytearray), "bytes", lambda value: bytes(value).hex()),
    (range, "range", lambda value: [hex(one) for one in (value.start, value.stop, value.step)]),
    (Fraction, "fraction", lambda value: [hex(value.numerator), hex(value.denominator)]),
    (Decimal, "decimal", str),
    (Real, "float", lambda value: float(value)),
    (complex, "complex", lambda value: [value.real, value.imag]),
    (Iterator, "iterator", _items),
)


def decode(value: Any) -> Any:
    """The value that `encode` was given. Raises BrokenFrameError for anything else."""
    if not isinstance(value, list):
        if isinstance(value, dict):
            raise BrokenFrameError("an object")
        return value
    if len(value) != 2 or not isinstance(value[0], str) or value[0] not in _DECODERS:
        raise BrokenFrameError("a list of another kind")
    try:
        return _DECODERS[value[0]](value[1])
    except (TypeError, ValueError, ArithmeticError, LookupError) as error:
        raise BrokenFrameError(f"no {value[0]}") from error


def _decoded(values: Any) -> list[Any]:
    if not isinstance(values, list):
        raise BrokenFrameError("no list of values")
    return [decode(one) for one in values]


def _hex(text: Any) -> int:
    return int(text, 16)


_DECODERS: Mapping[str, Callable[[Any], Any]] = {
    "bool": bool,
    "str": str,
    "int": _hex,
    "float": float,
    "list": _decoded,
    "tuple": lambda values: tuple(_decoded(values)),
    "set": lambda values: set(_decoded(values)),
    "frozenset": lambda values: frozenset(_decoded(values)),
    "dict": lambda pairs: {decode(key): decode(value) for key, value in pairs},
    "bytes": bytes.fromhex,
    "range": lambda ends: range(*map(_hex, ends)),
    "fraction": lambda parts: Fraction(*map(_hex, parts)),
    "decimal": Decimal,
    "complex": lambda parts: complex(float(parts[0]), float(parts[1])),
    "iterator": lambda values: iter(_decoded(values)),
    "object": lambda about: Opaque(str(about[0])[:100], bool(about[1])),
}


def frame(message: Any) -> bytes:
    """A message of JSON's types as bytes: four for the length, then the text.

    Raises BrokenFrameError if it is longer than a frame may be.
    """
    body = json.dumps(message).encode()
    if len(body) > MAX_FRAME:
        raise BrokenFrameError(f"{len(body):,} bytes of values, at most {MAX_FRAME:,} can be sent")
    return LENGTH.pack(len(body)) + body


def read_frame(descriptor: int) -> Any:
    """The next message of a blocking pipe; None at its end. Raises BrokenFrameError."""
    header = _read(descriptor, LENGTH.size)
    if len(header) < LENGTH.size:
        return None
    length = LENGTH.unpack(header)[0]
    if length > MAX_FRAME:
        raise BrokenFrameError(f"{length:,} bytes")
    return parsed(_read(descriptor, length))


def parsed(body: bytes) -> Any:
    """A message from its text. Raises BrokenFrameError if it is none."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise BrokenFrameError("no JSON") from error


def _read(descriptor: int, count: int) -> bytes:
    data = bytearray()
    while len(data) < count and (piece := os.read(descriptor, count - len(data))):
        data += piece
    return bytes(data)
