"""The names of all ways to rank experts, and the formula of each.

This module is loaded with every command, so it imports no numpy; `select.py` computes the scores.

A criterion over observations is S(a, b) / n^p of an expert, where S(a, b) is the sum of
gate^a x norm^b over the n tokens that were routed to it, gate is the weight that the router gave
it, and norm the L2 norm of its output before that weight. p = 0 is the sum, p = 1 the mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Formula:
    """S(gate, norm) / n^per, and in words."""

    gate: int  # power of the gate weight: 0, 1 or 2
    norm: int  # power of the norm of the output: 0, 1 or 2
    per: float  # power of the number of tokens that divides: 0 for a sum, 1 for a mean
    words: str  # what follows "an expert's score is", without a full stop


# The first six have the names of CerebrasResearch/reap's pruning metrics.
OBSERVED: dict[str, Formula] = {
    "reap": Formula(1, 1, 1, "the mean of gate weight times output norm"),
    "frequency": Formula(0, 0, 0, "the number of tokens routed to it"),
    "ean_sum": Formula(0, 1, 0, "the sum of output norms"),
    "ean_mean": Formula(0, 1, 1, "the mean output norm, called MAN elsewhere"),
    "weighted_ean_sum": Formula(1, 1, 0, "the sum of gate weight times output norm"),
    "weighted_frequency": Formula(1, 0, 0, "the sum of gate weights"),
    "mix25": Formula(1, 1, 0.75, "REAP's mean times the token count to the power 0.25"),
    "mix50": Formula(1, 1, 0.5, "REAP's mean times the square root of the token count"),
    "mix75": Formula(1, 1, 0.25, "REAP's mean times the token count to the power 0.75"),
    "gate_mean": Formula(1, 0, 1, "the mean gate weight"),
    "gate2_sum": Formula(2, 0, 0, "the sum of squared gate weights"),
    "gate2_mean": Formula(2, 0, 1, "the mean squared gate weight"),
    "norm2_sum": Formula(0, 2, 0, "the sum of squared output norms"),
    "msan": Formula(0, 2, 1, "the mean squared output norm"),
    "gate2_norm_sum": Formula(2, 1, 0, "the sum of squared gate weight times output norm"),
    "gate2_norm_mean": Formula(2, 1, 1, "the mean of squared gate weight times output norm"),
    "gate_norm2_sum": Formula(1, 2, 0, "the sum of gate weight times squared output norm"),
    "gate_norm2_mean": Formula(1, 2, 1, "the mean of gate weight times squared output norm"),
    "gate2_norm2_sum": Formula(2, 2, 0, "the sum of squared products of gate weight and norm"),
    "gate2_norm2_mean": Formula(2, 2, 1, "the mean squared product of gate weight and norm"),
}

# Scores of weights alone: nothing is observed.
FROM_WEIGHTS: dict[str, str] = {
    "aimer": "1 minus the mean magnitude of its weights divided by their root mean square",
    "weight_norms": "the product of the Frobenius norms of its matrices and of the norm of its "
    "router row",
}

GROUP_SIZE = 16  # experts of one of REAM's groups, at most: its C, as its authors set it
# Merges: experts become one with those that stay, layer by layer, in a pass of its own.
# REAM keeps the experts with the highest REAP scores and merges the others into those that they are
# most like; HC-SMoE merges clusters of experts whose outputs are alike.
MERGING = ("ream", "hc_smoe")

METHODS = (*OBSERVED, *FROM_WEIGHTS, *MERGING)
NO_METHOD = "none"  # of a bundle with all experts of its source
GIVEN = "given"  # as it is recorded where the user named the experts that stay
RECORDED = (*METHODS, GIVEN)  # what a manifest may name where experts were removed

_NAMES = {"reap": "REAP", "ream": "REAM", "hc_smoe": "HC-SMoE", GIVEN: "a given list of experts"}


def is_from_weights(method: str) -> bool:
    """Whether a method ranks experts without observations."""
    return method in FROM_WEIGHTS


def merges(method: str) -> bool:
    """Whether a method merges experts, and finds in a pass of its own which."""
    return method in MERGING


def done_by(methods: Sequence[str]) -> str:
    """What was done to the experts of a model by these methods, one after another."""
    merged = [merges(method) for method in methods]
    if not any(merged):
        return "pruned"
    return "merged" if all(merged) else "pruned and merged"


def method_name(method: str) -> str:
    """What a method is called; one without a name of its own as it is recorded."""
    return _NAMES.get(method, method)


def observes_nothing(method: str) -> bool:
    """Whether experts were chosen without any observations."""
    return method in FROM_WEIGHTS or method == GIVEN


def words_of(method: str) -> str:
    """What an expert's score is by a method; "" for a method that is none of these."""
    return OBSERVED[method].words if method in OBSERVED else FROM_WEIGHTS.get(method, "")
