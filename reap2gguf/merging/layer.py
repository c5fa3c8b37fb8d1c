"""The merge of one layer: which experts become one, and the matrices of those that do."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from reap2gguf.merging.alignment import (
    ReadMatrices,
    activation_costs,
    assigned,
    average,
    principal_components,
    weight_costs,
)
from reap2gguf.merging.grouping import (
    gated_similarity,
    hc_groups,
    merge_weights,
    penalised,
    ream_groups,
    ttm_distances,
)
from reap2gguf.merging.merge import LayerMerge
from reap2gguf.pruning.methods import OBSERVED
from reap2gguf.pruning.select import Kept, Target, keep_best, scores_by

if TYPE_CHECKING:
    from reap2gguf.merging.capture import Captured
    from reap2gguf.merging.merge import Group
    from reap2gguf.merging.statistics import ReamSums, TtmSums
    from reap2gguf.models.description import ModelFacts
    from reap2gguf.repairing.features import Map


@dataclass(frozen=True)
class MergeSpec:
    """How experts are merged."""

    method: str  # one of methods.MERGING
    target: Target
    group_size: int  # of REAM
    protected: Kept = field(default_factory=dict)  # experts that stay as they are

    @property
    def is_sequential(self) -> bool:
        """Whether a layer is merged by what reaches it in the model that is merged so far."""
        return self.method == "ream"


def best_by_reap(
    spec: MergeSpec, facts: ModelFacts, layer: int, captured: Captured
) -> tuple[int, ...]:
    """The experts of a layer with the highest REAP scores, ascending; protected ones stay."""
    scores = scores_by(OBSERVED["reap"], captured.seen)
    every = dict.fromkeys(facts.moe_layers, scores)
    return keep_best(every, spec.target, facts, spec.protected)[layer]


@torch.inference_mode()
def ream_merge(
    spec: MergeSpec, facts: ModelFacts, layer: int, captured: Captured, sums: ReamSums
) -> LayerMerge:
    """REAM's groups of a layer."""
    down = captured.experts.module.down_proj
    similarity = gated_similarity(sums.outputs(down).cpu().numpy(), sums.logits_gram.cpu().numpy())
    weights = merge_weights(scores_by(OBSERVED["reap"], captured.seen))
    kept = best_by_reap(spec, facts, layer, captured)
    alone = spec.protected.get(layer, ())
    groups = ream_groups(weights, similarity, kept, spec.group_size, alone)
    return LayerMerge(groups, captured.n_tokens)


def hc_merge(
    spec: MergeSpec, facts: ModelFacts, layer: int, captured: Captured, sums: TtmSums
) -> LayerMerge:
    """HC-SMoE's clusters of a layer."""
    counts = captured.seen.count.astype(float)
    distances = ttm_distances(sums.distances.cpu().numpy(), counts)
    alone = spec.protected.get(layer, ())
    groups = hc_groups(
        penalised(distances, counts), counts, spec.target.n_kept, facts.n_groups, alone
    )
    return LayerMerge(groups, captured.n_tokens)


@torch.inference_mode()
def merged_matrices(
    groups: Sequence[Group], read: ReadMatrices, captured: Captured | None, each: Map
) -> Mapping[int, Sequence[Tensor]]:
    """By its number among those that stay, the new matrices of each expert that is merged.

    read: an expert's matrices, of which down is the last    captured: what neurons are aligned by;
    None: they are averaged as they are
    """
    basis = None
    if captured is not None and any(group.is_merged for group in groups):
        basis = principal_components(read, captured.experts.n_experts, each)
    found = {}
    for number, group in enumerate(groups):
        if not group.is_merged:
            continue
        permutations: Iterable[object] = [None] * len(group.members)
        if captured is not None and basis is not None:
            by_weights = weight_costs(read, group.members, basis)
            by_activations = activation_costs(
                captured.experts, captured.samples, group.members, each
            )
            costs = [a + w for a, w in zip(by_activations, by_weights, strict=True)]
            permutations = [None, *each(assigned, costs)]
        found[number] = average(map(read, group.members), permutations, group.shares)  # type: ignore[arg-type]
    return found
