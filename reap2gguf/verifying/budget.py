"""How a size was divided between experts and bits, as a manifest has it, and what came of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from reap2gguf.bundle.layout import MANIFEST_FILE
from reap2gguf.messages import shown
from reap2gguf.pruning.methods import OBSERVED

if TYPE_CHECKING:
    from reap2gguf.bundle.manifest import Manifest


def check_budget(manifest: Manifest) -> Iterator[str]:
    """The number of experts that was taken, against the least damage and the pruning."""
    budget, pruning = manifest.budget, manifest.pruning
    if budget is None:
        return
    if (best := budget.best.n_experts) != pruning.n_kept:
        yield _wrong("pruning.n_kept", pruning.n_kept, f"{best}, with the least damage")
    if budget.counts[0].n_experts > pruning.n_experts:
        yield _wrong(
            "budget.counts", budget.counts[0].n_experts, f"at most {pruning.n_experts} experts"
        )
    if budget.method not in OBSERVED:
        yield _wrong("budget.method", budget.method, f"one of {', '.join(OBSERVED)}")


def _wrong(what: str, found: object, expected: str) -> str:
    return f"{MANIFEST_FILE}: {what} is {shown(found)}, expected {expected}"
