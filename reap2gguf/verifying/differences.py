"""Where a small text differs from the one that is expected."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

from reap2gguf.messages import shown

_AROUND = 40  # letters of a line that are shown on each side of the first that differs


def compare_text(path: Path, text: str, expected: str) -> Iterator[str]:
    """A violation that names the first line that differs."""
    if text == expected:
        return
    lines = zip_longest(text.split("\n"), expected.split("\n"))
    for number, (found, wanted) in enumerate(lines, start=1):
        if found != wanted:
            pairs = enumerate(zip_longest(found or "", wanted or ""))
            common = next((at for at, (a, b) in pairs if a != b), 0)
            yield (
                f"{where_of(path)} is not what this program writes: line {number} is "
                f"{_line(found, common)}, expected {_line(wanted, common)}"
            )
            return


def _line(text: str | None, position: int) -> str:
    """A line around a position; "missing" if there is no such line."""
    if text is None:
        return "missing"
    first = max(position - _AROUND, 0)
    part = text[first : position + _AROUND]
    return shown(("..." if first else "") + part)


def where_of(path: Path) -> str:
    return f"{path.parent.name}: {path.name}"
