"""How a merge fits into memory: batches, and what a layer's sums and sampled inputs take.

Beside what any sweep takes (two layers of the source at most, and the hidden states of all rows)
there are, of one layer at a time: sampled inputs, sums over experts, the covariance of neurons with
what its eigenvectors take, and the products of the neurons of a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from reap2gguf.merging.capture import SAMPLES
from reap2gguf.merging.statistics import COSINE_BYTES, PIECE
from reap2gguf.observing.batches import padded_batches
from reap2gguf.observing.budget import fit
from reap2gguf.observing.sweep_plan import SweepPlan, available_memory, groups_of, need_of

if TYPE_CHECKING:
    from reap2gguf.artifacts.texts import Row
    from reap2gguf.models.description import ModelFacts
    from reap2gguf.observing.sweep_plan import SweepContext
    from reap2gguf.options import ComputeOptions

_COVARIANCES = 4  # products, covariance, eigenvectors and LAPACK's work


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
    need, facts = need_of(context, rows), decoder.model.facts
    own = _ream_bytes if method == "ream" else _ttm_bytes
    taken = own(facts, need.n_positions, group_size, decoder.n_threads, decoder.dtype.itemsize)
    # a batch's inputs, routes and outputs; the merged layer lies in the memory of the source's
    need = replace(need, others=need.others + taken, position=need.position + 3 * need.hidden)
    budget = replace(fit(need, decoder.device.type, memory, options.spool), depth=1)
    groups = groups_of(rows, budget.batch_tokens, context.ranks, decoder.device)
    return SweepPlan(budget, padded_batches(groups, observed=True), len(rows), lambda n: False)


def _ream_bytes(
    facts: ModelFacts, n_positions: int, group_size: int, n_threads: int, itemsize: int
) -> int:
    """Bytes of a layer's statistics for REAM, or of its alignment: the larger of both."""
    hidden, width = facts.expert_io_width, facts.expert_width
    samples = min(SAMPLES, n_positions) * hidden * itemsize
    piece = n_threads * PIECE * width * (3 * itemsize + 8)
    sums = 8 * facts.n_experts * (facts.n_experts + width) + piece
    size = 3 * hidden
    members = min(group_size, facts.n_experts)
    aligning = 8 * (_COVARIANCES * size * size + 2 * width * size + 2 * members * width * width)
    return samples + max(sums, aligning + piece)


def _ttm_bytes(
    facts: ModelFacts, n_positions: int, group_size: int, n_threads: int, itemsize: int
) -> int:
    """Bytes of the outputs that are compared at once, and of their cosines."""
    least = 16 * facts.n_experts * 4 * (facts.expert_io_width + 4 * facts.n_experts)
    return 2 * max(COSINE_BYTES, least) + 8 * facts.n_experts**2
