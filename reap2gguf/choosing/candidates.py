"""The candidates: criteria by name, and the experts that each keeps of the same observations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from reap2gguf.pruning.select import select_experts

if TYPE_CHECKING:
    from reap2gguf.artifacts.observations import Observations
    from reap2gguf.models.description import ModelFacts
    from reap2gguf.pruning.select import Kept, Protected, Target


def kept_by(
    names: Sequence[str],
    observations: Observations,
    target: Target,
    facts: ModelFacts,
    protected: Protected | None = None,
) -> dict[str, Kept]:
    """By candidate, the experts that stay. Raises ArtifactError as `select_experts` does."""
    return {name: select_experts(observations, name, target, facts, protected) for name in names}


def first_with_same(kept: Mapping[str, Kept]) -> dict[str, str]:
    """By candidate, the first one that keeps the same experts: itself, or an earlier one."""
    found: dict[str, str] = {}
    for name, experts in kept.items():
        found[name] = next(other for other in kept if kept[other] == experts)
    return found
