"""What a merge takes of the memory, beside what any sweep does; nothing here loads torch.

Two layers of the source at most are there and the hidden states of all rows, and of one layer at a
time: sampled inputs, sums over experts, the covariance of neurons with what its eigenvectors take,
and the products of the neurons of a group.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from reap2gguf.models.description import ModelFacts
    from reap2gguf.observing.budget import Need

SAMPLES = 2**15  # tokens on which neurons are compared, at most: as REAM's authors have it
PIECE = 4096  # tokens whose activations an expert computes at once
COSINE_BYTES = 2**28  # of the outputs of all experts, for the tokens that are compared at once
LEAST_COMPARED = 16  # tokens
_COVARIANCES = 4  # products, covariance, eigenvectors and LAPACK's work


def merge_need(
    need: Need, facts: ModelFacts, method: str, group_size: int, n_threads: int, itemsize: int
) -> Need:
    """What a sweep that merges needs; `itemsize` is of a value that is computed."""
    taken = _ttm_bytes(facts)
    if method == "ream":
        taken = _ream_bytes(facts, need.n_positions, group_size, n_threads, itemsize)
    # a batch's inputs, routes and outputs; the merged layer lies in the memory of the source's
    return replace(need, others=need.others + taken, position=need.position + 3 * need.hidden)


def _ream_bytes(
    facts: ModelFacts, n_positions: int, group_size: int, n_threads: int, itemsize: int
) -> int:
    """Bytes of a layer's statistics for REAM, or of its alignment: the larger of both."""
    hidden, width = facts.hidden_size, facts.expert_width
    samples = min(SAMPLES, n_positions) * hidden * itemsize
    piece = n_threads * min(PIECE, n_positions) * width * (3 * itemsize + 8)
    sums = 8 * facts.n_experts * (facts.n_experts + width) + piece
    size, members = 3 * hidden, min(group_size, facts.n_experts)
    aligning = 8 * (_COVARIANCES * size * size + 2 * width * size + 2 * members * width * width)
    return samples + max(sums, aligning + piece)


def _ttm_bytes(facts: ModelFacts) -> int:
    """Bytes of the outputs that are compared at once, and of their cosines."""
    return 2 * max(COSINE_BYTES, LEAST_COMPARED * token_bytes(facts.n_experts, facts.hidden_size))


def token_bytes(n_experts: int, hidden: int) -> int:
    """Bytes of the outputs of all experts for one token, and of the cosines of all pairs."""
    return 4 * n_experts * (hidden + 4 * n_experts)
