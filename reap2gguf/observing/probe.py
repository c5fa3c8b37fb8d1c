"""The rows on which an MTP block is asked for its predictions. Nothing here loads torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from reap2gguf.artifacts.texts import ObservationRows, Row
    from reap2gguf.models.contract import MoeModel

PROBE_TOKENS = 16384  # on which an MTP block's predictions are counted


def mtp_probe(model: MoeModel, rows: ObservationRows) -> Sequence[Row]:
    """The first rows, on which an MTP block is asked for its predictions; none without a block."""
    if not model.facts.has_mtp:
        return ()
    chosen: list[Row] = []
    for row in rows.rows:
        if sum(map(len, chosen)) >= PROBE_TOKENS:
            break
        chosen.append(row)
    return chosen
