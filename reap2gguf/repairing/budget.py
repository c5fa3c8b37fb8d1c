"""How a repair fits into memory: the way of holding the Gram matrix, batches, and the spools.

Beside what any sweep takes there are both sides of a layer, the rows of one layer (twice the bytes
of its hidden states) and the normal equations. The first way that leaves room for batches of a good
size is taken: the Gram matrix on the device, in host memory, or never formed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from reap2gguf.errors import UsageError
from reap2gguf.observing.batches import padded_batches
from reap2gguf.observing.budget import HOST_BYTES, MOST_TOKENS, Budget, Memory, Need, fit, size_text
from reap2gguf.observing.sweep_plan import SweepPlan, available_memory, groups_of, need_of
from reap2gguf.repairing.gram import WAYS, GramSize, gram_size

if TYPE_CHECKING:
    from reap2gguf.artifacts.texts import Row
    from reap2gguf.observing.decoder import StreamedDecoder
    from reap2gguf.observing.sweep_plan import SweepContext
    from reap2gguf.options import ComputeOptions
    from reap2gguf.repairing.layer import RepairKind

_GOOD = 8  # a batch of at least the eighth part of the largest
_ROWS = 3  # hidden states that wait, inputs of the experts, and errors


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
    device = context.decoder.device
    memory = available_memory(device, context.ranks, options.memory)
    need = _need(context, original, rows)
    ways = ("",) if kind == "scale" else WAYS if way is None else (way,)
    found = _best(context, need, memory, options.spool, ways)
    budget = replace(found[1], depth=1)  # a layer is repaired before the next one is entered
    groups = groups_of(rows, budget.batch_tokens, context.ranks, device)
    plan = SweepPlan(budget, padded_batches(groups, observed=True), len(rows), lambda n: False)
    return RepairPlan(plan, found[0], _note(context, found[0]))


def _need(context: SweepContext, original: StreamedDecoder, rows: Sequence[Row]) -> Need:
    """What the sweep needs beside the normal equations."""
    need = need_of(context, rows)
    whole = max(original.layer_bytes(index) for index in range(context.n_layers))
    return replace(
        need,
        layer=whole,
        others=need.others + need.layer,
        # a batch's targets and errors, and a block of the original layer beside the pruned one
        position=need.position + 6 * need.hidden,
        hidden=_ROWS * need.hidden,
    )


def _best(
    context: SweepContext, need: Need, memory: Memory, spool: str, ways: Sequence[str]
) -> tuple[str, Budget]:
    """The first way with batches of a good size, else that with the largest ones."""
    kind = context.decoder.device.type
    found: list[tuple[str, Budget]] = []
    error: UsageError | None = None
    for way in ways:
        size = _size(context, way)
        if kind == "cpu" and way == "host" and len(ways) > 1:
            continue  # the same memory
        if size.host and size.host + need.n_positions * need.hidden > memory.host - HOST_BYTES:
            error = error or UsageError(
                f"the Gram matrix of a layer takes {size_text(size.host)} of RAM, and "
                f"{size_text(memory.host)} are free"
            )
            continue
        try:
            budget = fit(replace(need, others=need.others + size.device), kind, memory, spool)
        except UsageError as refused:
            error = refused
            continue
        found.append((way, budget))
        good = min(MOST_TOKENS[kind] // _GOOD, need.n_positions)
        if budget.batch_tokens >= max(good, need.longest_row):
            return found[-1]
    if not found:
        assert error is not None
        raise error
    return max(found, key=lambda one: one[1].batch_tokens)


def _size(context: SweepContext, way: str) -> GramSize:
    """Bytes of the normal equations of one layer."""
    decoder = context.decoder
    facts, on_gpu = decoder.model.facts, decoder.device.type == "cuda"
    if not way:  # the weights before and after, and one expert's number
        n_bytes = 4 * facts.n_experts * facts.expert_width * facts.expert_io_width * 8
        return GramSize(n_bytes, 0)
    return gram_size(
        way,
        facts.n_experts,
        facts.expert_width,
        facts.expert_io_width,
        4 if on_gpu else 8,
        on_gpu,
    )


def _note(context: SweepContext, way: str) -> str:
    facts = context.decoder.model.facts
    n = facts.n_experts * facts.expert_width
    where = {
        "": "one number per expert, no Gram matrix",
        "device": f"a Gram matrix of {n:,} x {n:,} where it is computed",
        "host": f"a Gram matrix of {n:,} x {n:,} in RAM",
        "never": f"a Gram matrix of {n:,} x {n:,} is never formed, which takes longer",
    }
    return f"repair: {where[way]}"
