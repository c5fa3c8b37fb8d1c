"""How a merge fits into the memory of the machine that it runs on; see `room.py`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from reap2gguf.merging.room import merge_need
from reap2gguf.observing.batches import padded_batches
from reap2gguf.observing.budget import fit
from reap2gguf.observing.sweep_plan import SweepPlan, available_memory, groups_of, need_of

if TYPE_CHECKING:
    from reap2gguf.artifacts.texts import Row
    from reap2gguf.observing.sweep_plan import SweepContext
    from reap2gguf.options import ComputeOptions


def plan_merge(
    context: SweepContext,
    rows: Sequence[Row],
    options: ComputeOptions,
    method: str,
    group_size: int,
) -> SweepPlan:
    """Divide the memory. Raises UsageError if it is too little for any batch."""
    decoder = context.decoder
    memory = available_memory(decoder.device, context.ranks, options.memory)
    how = method, group_size, decoder.n_threads, decoder.dtype.itemsize
    need = merge_need(need_of(context, rows), decoder.model.facts, *how)
    budget = replace(fit(need, decoder.device.type, memory, options.spool), depth=1)
    groups = groups_of(rows, budget.batch_tokens, context.ranks, decoder.device)
    return SweepPlan(budget, padded_batches(groups, observed=True), len(rows), lambda n: False)
