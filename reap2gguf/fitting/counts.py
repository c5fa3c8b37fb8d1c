"""The numbers of experts that are weighed against bits, where none are named."""

from __future__ import annotations

from typing import TYPE_CHECKING

from reap2gguf.errors import UsageError
from reap2gguf.pruning.select import choose_target

if TYPE_CHECKING:
    from reap2gguf.models.description import ModelFacts

# closer where few are removed: the damage of pruning grows faster than their number
SHARES = (1.0, 0.9375, 0.875, 0.8125, 0.75, 0.625, 0.5)


def usual_counts(facts: ModelFacts) -> list[int]:
    """How many experts may stay, the most first: those of `SHARES` that the model can run with."""
    found = set()
    for share in SHARES:
        count = round(share * facts.n_experts)
        try:
            found.add(choose_target(facts, count - count % facts.n_groups, None).n_kept)
        except UsageError:
            continue  # fewer than each token needs
    return sorted(found, reverse=True)
