"""How a repair fits into the memory of the machine that it runs on; see `ways.py`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from reap2gguf.observing.batches import padded_batches
from reap2gguf.observing.sweep_plan import SweepPlan, available_memory, groups_of, need_of
from reap2gguf.repairing.gram_size import WAYS
from reap2gguf.repairing.ways import best_way, layer_size, repair_need

if TYPE_CHECKING:
    from reap2gguf.artifacts.texts import Row
    from reap2gguf.models.description import ModelFacts
    from reap2gguf.observing.decoder import StreamedDecoder
    from reap2gguf.observing.sweep_plan import SweepContext
    from reap2gguf.options import ComputeOptions
    from reap2gguf.repairing.layer import RepairKind


@dataclass(frozen=True)
class RepairPlan:
    """How a repair runs."""

    sweep: SweepPlan
    way: str  # one of WAYS; "" where no normal equations are solved
    note: str  # for the user


def plan_repair(
    context: SweepContext,
    original: StreamedDecoder,
    rows: Sequence[Row],
    options: ComputeOptions,
    kind: RepairKind,
    way: str | None = None,
) -> RepairPlan:
    """Divide the memory; `way` is given, or the best that there is room for.

    Raises UsageError if the memory is too little for any.
    """
    device, facts = context.decoder.device, context.decoder.model.facts
    memory = available_memory(device, context.ranks, options.memory)
    whole = max(original.layer_bytes(index) for index in range(context.n_layers))
    need = repair_need(need_of(context, rows), whole)
    ways = ("",) if kind == "scale" else WAYS if way is None else (way,)
    found = best_way(
        need,
        lambda name: layer_size(facts, name, device.type == "cuda"),
        device.type,
        memory,
        options.spool,
        ways,
    )
    groups = groups_of(rows, found.budget.batch_tokens, context.ranks, device)
    plan = SweepPlan(
        found.budget, padded_batches(groups, observed=True), len(rows), lambda n: False
    )
    return RepairPlan(plan, found.name, _note(facts, found.name))


def _note(facts: ModelFacts, way: str) -> str:
    n = facts.n_experts * facts.expert_width
    where = {
        "": "one number per expert, no Gram matrix",
        "device": f"a Gram matrix of {n:,} x {n:,} where it is computed",
        "host": f"a Gram matrix of {n:,} x {n:,} in RAM",
        "never": f"a Gram matrix of {n:,} x {n:,} is never formed, which takes longer",
    }
    return f"repair: {where[way]}"
