"""The side files of a plan, such as a vision projector, and the types that their values need."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from reap2gguf.models.side_values import side_files, with_fitting_types

if TYPE_CHECKING:
    from reap2gguf.building.plan import Plan
    from reap2gguf.checkpoint.checkpoint import Checkpoint
    from reap2gguf.hub.retry import Note
    from reap2gguf.models.contract import MoeModel
    from reap2gguf.models.description import SideFile


def planned_side_files(model: MoeModel, checkpoint: Checkpoint) -> tuple[SideFile, ...]:
    """The side files, with the types that their values need, as far as these are on this machine.

    Values that are still on the Hub are looked at when the build starts.
    """
    sides = model.side_files(checkpoint.folder, checkpoint.tensors)
    try:
        return tuple(
            with_fitting_types(side, checkpoint) if _is_here(side, checkpoint) else side
            for side in sides
        )
    finally:
        if sides:
            checkpoint.close()  # a plan holds no open files; a later read opens them again


def _is_here(side: SideFile, checkpoint: Checkpoint) -> bool:
    stored = (slab.stored for tensor in side.tensors for slab in tensor.slabs)
    return not checkpoint.unfetched(stored)


def with_all_values(plan: Plan, note: Note) -> Plan:
    """The plan with side files whose values have all been looked at; what is missing is fetched.

    Raises what `with_fitting_types` raises, and what fetching raises.
    """
    if all(side.is_checked for side in plan.side_files):
        return plan
    sides = side_files(plan.model, plan.checkpoint)
    for line in (line for side in sides for line in side.notes):
        if not any(line in side.notes for side in plan.side_files):
            note(line)
    return replace(plan, side_files=sides)
