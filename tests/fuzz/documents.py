"""Well-formed documents and binary files in which some fields are not what they should be."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

# what `json.dumps` does not write: each stands for a text of its own
RAW = {
    "@nan": "NaN",
    "@infinite": "1e999",
    "@small": "-1e999",
    "@digits": "9" * 4200,
    "@too many digits": "9" * 5000,
    "@deep": "[" * 60 + "]" * 60,
    "@deeper": '{"a":' * 300 + "1" + "}" * 300,
    "@deepest": "[" * 3000 + "]" * 3000,
    "@half": '"\\ud800"',
}
ODD = (
    None, True, False, 0, 1, 2, 3, -1, 7, 2**16, 2**31 - 1, 2**31, 2**48, 2**63, 2**64, 10**300,
    0.5, -0.5, 1e-300, 1e300, "", " ", "x", "F32", "a\nb", "\x1b[2J", "\0", "../x", "/x", "\u202e",
    [], {}, [[]], [None], [{}], {"a": []}, [1], [0, 0], ["x"], "9" * 400, "x" * 5000, [1] * 3000,
    *RAW,
)  # fmt: skip
Path = tuple[str | int, ...]


def places(document: Any) -> list[Path]:
    """Where every value of a document is."""
    found: list[Path] = []
    if isinstance(document, dict | list):
        pairs = document.items() if isinstance(document, dict) else enumerate(document)
        for key, value in pairs:
            found += [(key,), *((key, *rest) for rest in places(value))]
    return found


@st.composite
def changed(draw: st.DrawFn, document: Any, most: int = 3) -> str:
    """JSON text of a document with some values replaced, removed, added, or of another length."""
    result = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, most))):
        if where := places(result):
            _change(draw, result, draw(st.sampled_from(where)))
    return as_text(result)


def _change(draw: st.DrawFn, document: Any, path: Path) -> None:
    inner = document
    for step in path[:-1]:
        inner = inner[step]
    last, odd = path[-1], copy.deepcopy(draw(st.sampled_from(ODD)))
    what = draw(st.sampled_from(["value", "value", "value", "remove", "add", "all items"]))
    if what == "remove":
        del inner[last]
    elif what == "add" and isinstance(inner, dict):
        inner["x" if isinstance(odd, dict | list) else str(odd)] = odd
    elif what == "add":
        inner.append(odd)
    elif what == "all items" and isinstance(inner[last], list):
        inner[last] = [copy.deepcopy(odd) for _ in inner[last]]
    else:
        inner[last] = odd


def as_text(document: Any) -> str:
    """JSON of a document, `RAW` written out."""
    text = json.dumps(document)
    for word, raw in RAW.items():
        text = text.replace(json.dumps(word), raw)
    return text


@dataclass(frozen=True)
class Number:
    """A little-endian integer field of a binary file."""

    value: int
    width: int

    def encoded(self) -> bytes:
        return (self.value % 2 ** (8 * self.width)).to_bytes(self.width, "little")


Piece = Number | bytes
NUMBERS = (0, 1, 2, 3, 4, 5, 8, 9, 12, 13, 24, 33, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**48,
           2**63 - 1, 2**63, 2**64 - 1)  # fmt: skip


def joined(pieces: list[Piece]) -> bytes:
    """The file that the pieces are."""
    return b"".join(p.encoded() if isinstance(p, Number) else p for p in pieces)


@st.composite
def spoiled(draw: st.DrawFn, pieces: list[Piece], most: int = 2) -> bytes:
    """The file with some of its fields changed, and at times cut or longer."""
    result = list(pieces)
    for _ in range(draw(st.integers(1, most))):
        place = draw(st.integers(0, len(result) - 1))
        result[place] = _spoil(draw, result[place])
    content = joined(result)
    if draw(st.integers(0, 7)) == 0:
        content = content[: draw(st.integers(0, len(content)))]
    return content + bytes(draw(st.sampled_from([0, 0, 0, 1, 64])))


def _spoil(draw: st.DrawFn, piece: Piece) -> Piece:
    if isinstance(piece, Number):
        near = st.sampled_from([piece.value + 1, piece.value - 1, 2 * piece.value])
        return Number(draw(st.sampled_from(NUMBERS) | near | st.integers(0, 300)), piece.width)
    keep: Callable[[bytes], bytes] = bytes
    same_length = st.binary(min_size=len(piece), max_size=len(piece)).map(keep)
    return draw(same_length | st.binary(max_size=12) | st.just(piece + piece))
