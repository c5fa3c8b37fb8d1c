"""The files of a build that slices a GGUF source: their names, headers and sizes."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from reap2gguf.exporting.header_facts import pruning_values
from reap2gguf.gguf_source.writing import planned

if TYPE_CHECKING:
    from pathlib import Path

    from reap2gguf.building.plan import Plan
    from reap2gguf.gguf_source.checkpoint import GgufCheckpoint
    from reap2gguf.gguf_source.writing import PrunedGguf
    from reap2gguf.pruning.view import PrunedView


def sliced_files(plan: Plan, pruned: PrunedView, folder: Path) -> PrunedGguf:
    """What is written to `folder`, if these experts stay; their sizes are the same of any others.

    Raises UnsupportedModelError if the source cannot be sliced.
    """
    checkpoint, kept = cast("GgufCheckpoint", plan.checkpoint), pruned.kept
    earlier = None if plan.history is None else plan.history.after(kept)
    own = pruning_values(
        plan.source.gguf_name, plan.method, plan.target.n_experts, kept, earlier=earlier
    )
    (recipe,) = plan.recipes
    return planned(checkpoint, pruned, folder / plan.gguf_name(recipe), plan.name, own)
