"""Text from files and arguments as a terminal may show it: short, and on one line."""

from __future__ import annotations

import reprlib
from typing import Any

_MOST_LETTERS = 1600  # of a line: a path of 255 names is longer than anyone reads
_MOST_SHOWN = 500  # of a value

_SHORT = reprlib.Repr()
_SHORT.maxlevel = 3
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = 8
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 120


def shown(value: Any) -> str:
    """A value that was read from a file, as `repr` writes it, cut where it is long."""
    try:
        text = _SHORT.repr(value)
    except ValueError:  # Python spells no integer of thousands of digits, which TOML can hold
        return "an integer of thousands of digits"
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."


def one_line(text: str) -> str:
    """`text` without line breaks and control characters, its middle left out where it is long.

    A name from a file could otherwise move the cursor, colour the terminal, or pass for a line of
    this program.

    >>> one_line("a\\x1b[2Jb\\nc")
    'a\\\\x1b[2Jb\\\\nc'
    """
    if len(text) <= _MOST_LETTERS:
        return _escaped(text)
    # what is wrong stands at the beginning, what to do at the end
    half = _MOST_LETTERS // 2
    left_out = f" [... {len(text) - 2 * half:,} letters left out ...] "
    return _escaped(text[:half])[:half] + left_out + _escaped(text[-half:])[-half:]


def _escaped(text: str) -> str:
    if text.isprintable():
        return text
    letters = (c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
    return "".join(letters)
