"""The protected experts that a manifest records, against what it keeps and what was asked for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from reap2gguf.bundle.layout import MANIFEST_FILE
from reap2gguf.bundle.manifest import NO_METHOD
from reap2gguf.errors import UsageError
from reap2gguf.messages import shown
from reap2gguf.pruning.protection import named_experts, read_pinned

if TYPE_CHECKING:
    from reap2gguf.bundle.manifest import PruningRecord
    from reap2gguf.bundle.options_record import OptionsRecord


def check_protected(pruning: PruningRecord) -> Iterator[str]:
    """Protected experts that were not kept, one violation for each layer."""
    for name in ("protected", "super_experts"):
        for layer, ids in getattr(pruning, name).items():
            if gone := sorted(set(ids) - set(pruning.kept.get(layer, ()))):
                yield (
                    f"{MANIFEST_FILE}: pruning.{name} of layer {layer} names {gone}, expected "
                    "experts that were kept"
                )


def check_asked(pruning: PruningRecord, options: OptionsRecord) -> Iterator[str]:
    """Protected experts that the options did not ask for, or that they ask for in vain."""
    named: dict[int, tuple[int, ...]] = {}
    if pruning.method != NO_METHOD and pruning.kept:
        try:
            pinned = read_pinned(options.protect)
            named = named_experts(pinned, tuple(sorted(pruning.kept)), pruning.n_experts)
        except UsageError as error:
            yield f"{MANIFEST_FILE}: options.protect does not fit: {error}"
            return
    found = {layer: tuple(ids) for layer, ids in pruning.protected.items()}
    if found != named:
        yield (
            f"{MANIFEST_FILE}: pruning.protected is {shown(found)}, expected {shown(named)} by "
            "options.protect"
        )
    if pruning.super_experts and not options.protect_super_experts:
        yield (
            f"{MANIFEST_FILE}: pruning.super_experts is {shown(dict(pruning.super_experts))}, "
            "expected none: options.protect_super_experts is false"
        )
