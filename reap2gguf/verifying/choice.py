"""The choice of a method, as a manifest has it: against the rule, the pruning and the options."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from reap2gguf.bundle.layout import MANIFEST_FILE
from reap2gguf.bundle.manifest import NO_METHOD
from reap2gguf.choosing.names import AUTO, BEST_REPAIRED, BUILD_METHODS, split_name
from reap2gguf.choosing.rule import best
from reap2gguf.messages import shown
from reap2gguf.pruning.methods import GIVEN, OBSERVED

if TYPE_CHECKING:
    from reap2gguf.bundle.manifest import Manifest


def check_chosen_method(manifest: Manifest) -> Iterator[str]:
    """The method that was taken, against the rule and what was measured."""
    choice = manifest.choice
    if choice is None:
        return
    (taken, is_repaired), pruning = split_name(choice.chosen), manifest.pruning
    if pruning.method != taken:
        yield _wrong("pruning.method", pruning.method, f"{shown(taken)} by its choice")
    if choice.chosen != (name := best(choice.candidates).name):
        yield _wrong("choice.chosen", choice.chosen, f"{shown(name)} by the rule")
    if is_repaired and pruning.repair is None:
        yield _wrong("pruning.repair", None, f"a record, as {choice.chosen} was chosen")
    for one in choice.candidates:
        if split_name(one.name)[0] not in OBSERVED:
            yield _wrong("choice.candidates", one.name, f"one of {', '.join(OBSERVED)}")


def asked_methods(manifest: Manifest) -> tuple[str, ...]:
    """The methods that may have been asked for."""
    if manifest.choice is not None:
        return (AUTO,)
    method = manifest.pruning.method
    return BUILD_METHODS if method in (NO_METHOD, GIVEN) else (method,)


def asked_repairs(manifest: Manifest) -> tuple[str, ...]:
    """The repairs that may have been asked for: one that was chosen was a candidate."""
    repair, choice = manifest.pruning.repair, manifest.choice
    if choice is not None and split_name(choice.chosen)[1]:
        return ("none",)
    return ("none" if repair is None else repair.kind,)


def asked_candidates(manifest: Manifest) -> tuple[str | None, ...]:
    """The candidates as the options may record them.

    One that was to be repaired is left out of the choice where the text was too short for it.
    """
    choice = manifest.choice
    if choice is None:
        return (None,)
    names = [one.name for one in choice.candidates if not split_name(one.name)[1]]
    repaired = ",".join([*names, BEST_REPAIRED])
    return (repaired,) if len(names) < len(choice.candidates) else (",".join(names), repaired)


def _wrong(what: str, found: object, expected: str) -> str:
    return f"{MANIFEST_FILE}: {what} is {shown(found)}, expected {expected}"
