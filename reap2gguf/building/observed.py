"""What a build observed of the experts, or was given."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from reap2gguf.artifacts.observations import Observations
    from reap2gguf.building.plan import Plan
    from reap2gguf.building.stages import Observe


def observations_of(plan: Plan, observed: Observe | None) -> Observations | None:
    """What a build observed, or was given; None where nothing is pruned."""
    if observed is not None:
        return observed.result
    return None if plan.observations is None else plan.observations.seen


def observations_sha256(plan: Plan, observed: Observe | None) -> str:
    """The hash of the observations' file; "" where there is none."""
    if observed is not None:
        return observed.sha256
    return "" if plan.observations is None else plan.observations.sha256
