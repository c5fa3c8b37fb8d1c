"""Text from files as a message may show it: short, and on one line."""

from __future__ import annotations

import reprlib
from typing import Any

_SHORT = reprlib.Repr()
_SHORT.maxlevel = 3
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = 8
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 120
_MOST_LETTERS = 500


def shown(value: Any) -> str:
    """A value that was read from a file, as `repr` writes it, cut where it is long.

    >>> shown([7] * 1000).count("7")
    8
    """
    try:
        text = _SHORT.repr(value)
    except ValueError:  # Python spells no integer of thousands of digits, which TOML can hold
        return "an integer of thousands of digits"
    return text if len(text) <= _MOST_LETTERS else f"{text[:_MOST_LETTERS]}..."
