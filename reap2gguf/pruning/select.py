"""Which experts are kept: published criteria over the observations, and how many."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from decimal import ROUND_CEILING, Context, Decimal
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from reap2gguf.errors import ArtifactError, UsageError
from reap2gguf.pruning.counts import check_counts
from reap2gguf.pruning.methods import OBSERVED, Formula

if TYPE_CHECKING:
    from reap2gguf.artifacts.observations import LayerObservation, Observations
    from reap2gguf.models.description import ModelFacts

Scores = npt.NDArray[np.float64]
Kept = Mapping[int, tuple[int, ...]]  # layer -> source ids of the kept experts, ascending
Protected = Mapping[int, Collection[int]]  # layer -> source ids of experts that must stay
DEFAULT_COMPRESSION = 0.25
_FUSED = (*(2**n for n in range(9)), 288, 512, 576)  # counts of experts, ascending


# the sum of gate^a x norm^b of an observation, by (a, b)
_SUMS = {
    (1, 1): "reap_sum",
    (1, 0): "gate_sum",
    (0, 1): "norm_sum",
    (2, 0): "gate2_sum",
    (0, 2): "norm2_sum",
    (2, 1): "gate2_norm_sum",
    (1, 2): "gate_norm2_sum",
    (2, 2): "gate2_norm2_sum",
}


def scores_by(formula: Formula, seen: LayerObservation) -> Scores:
    """The score of each expert, (E,); one without tokens scores zero.

    Raises ArtifactError if the observations are of a format that lacks what the formula needs.
    """
    powers = (formula.gate, formula.norm)
    if powers == (0, 0):
        return seen.count.astype(np.float64)
    sums: Scores | None = getattr(seen, _SUMS[powers])
    if sums is None:
        raise ArtifactError(
            f"observations: have no {_SUMS[powers]}, as they were made by an earlier version; run "
            "`reap2gguf observe` again, or choose another --method"
        )
    if formula.per == 0:
        return sums
    count = np.maximum(seen.count, 1)
    return sums / (count if formula.per == 1 else count**formula.per)


# The highest scores are kept.
CRITERIA: dict[str, Callable[[LayerObservation], Scores]] = {
    name: partial(scores_by, formula) for name, formula in OBSERVED.items()
}


@dataclass(frozen=True)
class Target:
    """How many experts each layer keeps, and the compression that this is."""

    n_experts: int
    n_kept: int

    @property
    def n_dropped(self) -> int:
        return self.n_experts - self.n_kept

    @property
    def prunes(self) -> bool:
        """Whether any expert is removed."""
        return self.n_dropped > 0

    @property
    def compression(self) -> float:
        return self.n_dropped / self.n_experts


def choose_target(facts: ModelFacts, keep_experts: int | None, compression: float | None) -> Target:
    """The number of experts to keep, from either option; by default 25 % are dropped.

    `compression` R drops floor(E * R) experts: 0.32 of 256 keeps 175. 0 keeps all of them. Raises
    UsageError if a larger R drops none, or if the number is not one the model can run with.
    """
    check_counts(keep_experts, compression)
    total, needed = facts.n_experts, facts.experts_per_token
    if keep_experts is None:
        ratio = DEFAULT_COMPRESSION if compression is None else compression
        keep_experts = kept_at(ratio, total)
        if ratio > 0 and keep_experts == total:
            raise UsageError(_drops_none(facts, ratio))
    if keep_experts > total:
        raise UsageError(f"--keep-experts {keep_experts}: the model has {total} experts per layer")
    if keep_experts < needed:
        raise UsageError(
            f"keeping {keep_experts} of {total} experts: the router picks {needed} for each token "
            f"(num_experts_per_tok); keep at least {needed}"
        )
    _check_groups(facts, keep_experts)
    return Target(total, keep_experts)


def kept_at(ratio: float, total: int) -> int:
    """How many of `total` experts stay where floor(total x ratio) are removed."""
    # the decimal the user typed, not its nearest binary fraction: 0.29 of 100 drops 29
    return total - math.floor(total * Decimal(str(ratio)))


def _drops_none(facts: ModelFacts, ratio: float) -> str:
    """Why a ratio is too small, and the smallest that is not."""
    total, least = facts.n_experts, facts.n_groups
    needed = Decimal(least) / Decimal(total)
    digits = Context(prec=4, rounding=ROUND_CEILING)
    smallest = f"{needed.normalize(digits):f}"
    advice = f"--compression {smallest} drops {least}"
    if total - least < facts.experts_per_token:
        advice = f"this model needs {facts.experts_per_token} of them for each token"
    return (
        f"--compression {ratio:g} of {total} experts per layer drops none; {advice}, and "
        "--compression 0 keeps all"
    )


def _check_groups(facts: ModelFacts, n_kept: int) -> None:
    """Refuse a count that the router's groups cannot share evenly, or that is too few for them."""
    groups, needed = facts.n_groups, facts.experts_per_token
    if groups == 1:
        return
    # llama.cpp scores a group by its two best experts; the chosen groups must hold enough
    least = groups * max(2, math.ceil(needed / facts.groups_per_token))
    if n_kept % groups or n_kept < least:
        nearest = min(max(least, round(n_kept / groups) * groups), facts.n_experts)
        raise UsageError(
            f"keeping {n_kept} of {facts.n_experts} experts: the router has {groups} groups of "
            f"equal size, expected a multiple of {groups} from {least} to {facts.n_experts}; pass "
            f"--keep-experts {nearest}"
        )


def select_experts(
    observations: Observations,
    method: str,
    target: Target,
    facts: ModelFacts,
    protected: Protected | None = None,
) -> dict[int, tuple[int, ...]]:
    """Per layer, the experts with the highest scores by a criterion over observations.

    As `keep_best`. Raises ArtifactError if the observations are of another model, or lack what the
    criterion needs.
    """
    if not set(facts.moe_layers) <= set(observations.layers):
        raise ArtifactError(
            f"observations: {len(observations.layers)} layers, expected the model's "
            f"{len(facts.moe_layers)} MoE layers; pass observations of this model"
        )
    scores = {
        layer: CRITERIA[method](observations.layers[layer]) for layer in sorted(facts.moe_layers)
    }
    for layer, found in scores.items():
        if found.shape != (target.n_experts,):
            raise ArtifactError(
                f"observations: layer {layer} has {len(found)} experts, expected "
                f"{target.n_experts}; pass observations of this model"
            )
    return keep_best(scores, target, facts, protected)


def keep_best(
    scores: Mapping[int, Scores],
    target: Target,
    facts: ModelFacts,
    protected: Protected | None = None,
) -> dict[int, tuple[int, ...]]:
    """Per layer, the experts with the highest scores (E,); between equal scores, the lower id.

    Where the router has groups, each group keeps the same number. Protected experts stay whatever
    they score; that there is room for them has been checked.
    """
    kept: dict[int, tuple[int, ...]] = {}
    for layer in facts.moe_layers:
        ranked = scores[layer].copy()
        ranked[list((protected or {}).get(layer, ()))] = np.inf
        by_group = ranked.reshape(facts.n_groups, -1)
        best_first = np.argsort(-by_group, axis=1, kind="stable")
        best = best_first[:, : target.n_kept // facts.n_groups]
        first_ids = np.arange(facts.n_groups)[:, None] * by_group.shape[1]
        kept[layer] = tuple(int(expert) for expert in np.sort((first_ids + best).ravel()))
    return kept


def friendly_count(target: Target, needed: int) -> int:
    """The nearest count that vLLM has fast kernels for: a multiple of 16, or of 8 below 16."""
    step = 16 if target.n_kept >= 16 else 8
    nearest = max(step, round(target.n_kept / step) * step)
    return nearest if needed <= nearest <= target.n_experts else target.n_kept


def is_fused(n_experts: int) -> bool:
    """Whether llama.cpp's fused top-k on CUDA takes a count (ggml/src/ggml-cuda/topk-moe.cu).

    It never takes a router with groups of experts.
    """
    return n_experts in _FUSED


def fused_counts(target: Target, needed: int) -> list[int]:
    """The nearest such counts below and above the kept experts that a pruned model can have."""
    possible = [count for count in _FUSED if needed <= count < target.n_experts]
    below = [count for count in possible if count < target.n_kept]
    above = [count for count in possible if count > target.n_kept]
    return below[-1:] + above[:1]
