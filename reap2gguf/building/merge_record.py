"""What is recorded of a merge."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from reap2gguf.bundle.records import MergedLayerRecord, MergeRecord

if TYPE_CHECKING:
    from reap2gguf.artifacts.texts import ObservationRows
    from reap2gguf.merging.folder import MergedLayer
    from reap2gguf.models.contract import MoeModel


def merge_record_of(
    method: str,
    group_size: int,
    model: MoeModel,
    rows: ObservationRows,
    layers: Mapping[int, MergedLayer],
    n_tensors: int,
) -> MergeRecord:
    """What is recorded of a merge; `n_tensors` have new values.

    A multi-token-prediction block is not in it: no experts became one there.
    """
    return MergeRecord(
        method,
        group_size if method == "ream" else None,
        rows.label,
        rows.sha256,
        len(rows.rows),
        sum(map(len, rows.rows)),
        n_tensors,
        {
            layer: MergedLayerRecord(
                tuple(group.members for group in one.facts.groups),
                tuple(group.shares for group in one.facts.groups),
                one.sha256,
            )
            for layer, one in layers.items()
            if layer != model.facts.mtp_layer
        },
    )
