"""The name of a choice by measuring, and those of the methods that it is between.

This module is loaded with every command, so it imports no numpy.
"""

from __future__ import annotations

from collections.abc import Iterable

from reap2gguf.errors import ParameterError
from reap2gguf.pruning.methods import MERGING, METHODS, OBSERVED, merges

AUTO = "auto"  # the best of several methods, by what each costs
BUILD_METHODS = (*METHODS, AUTO)
REPAIRED = "+repair"  # after the name of a criterion: its kept experts are repaired
BEST_REPAIRED = f"best{REPAIRED}"  # of the criterion that is best without a repair
_CRITERIA = ("reap", "weighted_ean_sum", "weighted_frequency", "frequency", "ean_mean")
CANDIDATES = (*_CRITERIA, BEST_REPAIRED)  # what is measured unless others are named


def split_name(candidate: str) -> tuple[str, bool]:
    """The criterion of a candidate, and whether the experts that it keeps are repaired."""
    return candidate.removesuffix(REPAIRED), candidate.endswith(REPAIRED)


def check_candidates(value: object) -> tuple[str, ...]:
    """What to choose from, each once, from names with commas, a list, or `all`; None: the usual.

    `all` are the criteria and the repair. Methods that merge experts come after the criteria, and
    BEST_REPAIRED comes last. Raise UsageError for anything else.
    """
    if value is None:
        return CANDIDATES
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, Iterable) or isinstance(parts, bytes):
        raise ParameterError(f"candidates is {value!r}, expected names of methods", "candidates")
    names = [part.strip() if isinstance(part, str) else part for part in parts]
    known = (*OBSERVED, *MERGING, BEST_REPAIRED)
    if names == ["all"]:
        return (*OBSERVED, BEST_REPAIRED)
    for name in names:
        if name not in known:
            raise ParameterError(
                f"candidates names {name!r}, expected some of {', '.join(known)}, or all",
                "candidates",
            )
    if not set(names) - {BEST_REPAIRED, *MERGING}:
        raise ParameterError(
            "candidates names no criterion, such as reap or weighted_ean_sum", "candidates"
        )
    named = dict.fromkeys(names)
    found = (*criteria_of(named), *merging_of(named))
    return (*found, BEST_REPAIRED) if BEST_REPAIRED in named else found


def check_build_candidates(value: object) -> tuple[str, ...]:
    """The same for a build, which chooses among criteria alone. Raises UsageError."""
    names = check_candidates(value)
    if merging := merging_of(names):
        raise ParameterError(
            f"candidates names {merging[0]}, which merges experts, and a build does not choose "
            "among merges; measure it with `reap2gguf choose`, and build with the method that it "
            "finds",
            "candidates",
        )
    return names


def criteria_of(candidates: Iterable[str]) -> tuple[str, ...]:
    """The candidates that are criteria alone."""
    return tuple(name for name in candidates if name in OBSERVED)


def merging_of(candidates: Iterable[str]) -> tuple[str, ...]:
    """The candidates that merge experts."""
    return tuple(filter(merges, candidates))
