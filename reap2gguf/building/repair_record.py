"""What is recorded of a repair, and where a choice keeps the one of its candidate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from reap2gguf.bundle.records import RepairedLayerRecord, RepairRecord

if TYPE_CHECKING:
    from reap2gguf.artifacts.texts import ObservationRows
    from reap2gguf.repairing.record import RepairedLayer

REPAIRED_CANDIDATE = ".repaired-candidate"  # a folder; no name of a bundle begins with a dot


def record_of(
    kind: str, rows: ObservationRows, layers: Mapping[int, RepairedLayer], n_tensors: int
) -> RepairRecord:
    """What is recorded of a repair; `n_tensors` have new values."""
    first = next(iter(layers.values())).facts
    return RepairRecord(
        kind,
        rows.label,
        rows.sha256,
        first.n_fitted,
        first.n_held_out,
        n_tensors,
        {
            layer: RepairedLayerRecord(
                one.facts.alpha, one.facts.error_before, one.facts.error_after, one.sha256
            )
            for layer, one in layers.items()
        },
    )
