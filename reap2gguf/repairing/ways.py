"""The ways of holding a layer's Gram matrix, what each takes, and which one some memory allows.

Beside what any sweep takes, a repair has both sides of a layer, the rows of one layer (twice the
bytes of its hidden states) and the normal equations. The first way that leaves room for batches of
a good size is taken: the Gram matrix on the device, in host memory, or never formed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from reap2gguf.errors import UsageError
from reap2gguf.observing.budget import HOST_BYTES, MOST_TOKENS, Budget, Memory, Need, fit, size_text
from reap2gguf.repairing.gram_size import WAYS, GramSize, gram_size

if TYPE_CHECKING:
    from reap2gguf.models.description import ModelFacts

_GOOD = 8  # a batch of at least the eighth part of the largest
_ROWS = 3  # hidden states that wait, inputs of the experts, and errors


@dataclass(frozen=True)
class Way:
    """How a repair runs."""

    name: str  # one of WAYS; "" where no normal equations are solved
    size: GramSize
    need: Need  # of the sweep, beside the normal equations
    budget: Budget

    @property
    def whole_need(self) -> Need:
        """What the device holds."""
        return replace(self.need, others=self.need.others + self.size.device)


def layer_size(facts: ModelFacts, way: str, on_gpu: bool) -> GramSize:
    """The same of a layer of a pruned model; "" is a repair by one number per expert."""
    if not way:  # the weights before and after
        return GramSize(4 * facts.n_experts * facts.expert_width * facts.expert_io_width * 8, 0)
    shape = facts.n_experts, facts.expert_width, facts.expert_io_width
    return gram_size(way, *shape, 4 if on_gpu else 8, on_gpu)


def repair_need(need: Need, original_layer: int) -> Need:
    """What a repair's sweep needs, given what a sweep over the pruned model does.

    `original_layer`: bytes of the weights of the source's largest layer
    """
    return replace(
        need,
        layer=original_layer,
        others=need.others + need.layer,
        # a batch's targets and errors, and a block of the original layer beside the pruned one
        position=need.position + 6 * need.hidden,
        hidden=_ROWS * need.hidden,
    )


def best_way(
    need: Need,
    size_of: Callable[[str], GramSize],
    device_type: str,
    memory: Memory,
    spool: str,
    ways: Sequence[str] = WAYS,
) -> Way:
    """The first way with batches of a good size, else that with the largest ones.

    Raises UsageError if the memory is too little for any.
    """
    found: list[Way] = []
    error: UsageError | None = None
    for name in ways:
        size = size_of(name)
        if device_type == "cpu" and name == "host" and len(ways) > 1:
            continue  # the same memory
        if size.host and size.host + need.n_positions * need.hidden > memory.host - HOST_BYTES:
            error = error or UsageError(
                f"the Gram matrix of a layer takes {size_text(size.host)} of RAM, and "
                f"{size_text(memory.host)} are free"
            )
            continue
        whole = replace(need, others=need.others + size.device)
        try:
            budget = fit(whole, device_type, memory, spool)
        except UsageError as refused:
            error = refused
            continue
        # a layer is repaired before the next one is entered
        found.append(Way(name, size, need, replace(budget, depth=1)))
        good = min(MOST_TOKENS[device_type] // _GOOD, need.n_positions)
        if budget.batch_tokens >= max(good, need.longest_row):
            return found[-1]
    if not found:
        assert error is not None
        raise error
    return max(found, key=lambda one: one.budget.batch_tokens)
