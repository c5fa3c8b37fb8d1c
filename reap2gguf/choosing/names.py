"""The name of a choice by measuring, and those of the methods that it is between.

This module is loaded with every command, so it imports no numpy.
"""

from __future__ import annotations

from collections.abc import Iterable

from reap2gguf.errors import UsageError
from reap2gguf.pruning.methods import METHODS, OBSERVED

AUTO = "auto"  # the best of several methods, by what each costs
BUILD_METHODS = (*METHODS, AUTO)
# the methods that are measured unless others are named
CANDIDATES = ("reap", "weighted_ean_sum", "weighted_frequency", "frequency", "ean_mean")


def check_candidates(value: object) -> tuple[str, ...]:
    """Methods to choose from, each once, from names with commas, a list, or `all`; None: the usual.

    Raise UsageError for anything else.
    """
    if value is None:
        return CANDIDATES
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, Iterable) or isinstance(parts, bytes):
        raise UsageError(f"candidates is {value!r}, expected names of methods")
    names = [part.strip() if isinstance(part, str) else part for part in parts]
    if names == ["all"]:
        return tuple(OBSERVED)
    for name in names:
        if name not in OBSERVED:
            known = ", ".join(OBSERVED)
            raise UsageError(f"candidates names {name!r}, expected some of {known}, or all")
    if not names:
        raise UsageError("candidates is empty, expected names of methods, such as reap,frequency")
    return tuple(dict.fromkeys(names))
