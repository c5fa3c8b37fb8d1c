"""The table of a budget, for people."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from reap2gguf.bundle.budget import best_of
from reap2gguf.messages import size

if TYPE_CHECKING:
    from reap2gguf.bundle.budget import CountRecord


def budget_lines(counts: Sequence[CountRecord], n_scored: int) -> Iterator[str]:
    """A line for each number of experts, and what the figures are."""
    best = best_of(counts)
    yield "experts   bits        size    pruning (measured)  quantizing (predicted)  together"
    for one in counts:
        pruning = f"{one.pruning:.4f} ± {one.pruning_error:.4f}"
        if one.bits_per_weight is None or one.n_bytes is None:
            yield f"{one.n_experts:>7}      -           -   {pruning:>19}   {'does not fit':>21}"
            continue
        marked = "  best" if one is best else ""
        yield (
            f"{one.n_experts:>7}  {one.bits_per_weight:>5.2f}  {size(one.n_bytes):>10}   "
            f"{pruning:>19}   {one.quantizing:>21.4f}  {one.damage:>8.4f}{marked}"
        )
    yield f"KL divergence from the source in nats per token; {n_scored:,} tokens scored"
