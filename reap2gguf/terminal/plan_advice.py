"""What a plan says of counts of experts that are fast elsewhere, of rows that fit no blocks, of the
tokens that experts have seen, and of what is measured."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from reap2gguf.building.needs.scoring import CHUNK
from reap2gguf.gguf_files.activation_statistics import expert_hits_of
from reap2gguf.gguf_files.imatrix_coverage import FEW, hits_line
from reap2gguf.pruning.select import friendly_count, fused_counts, is_fused
from reap2gguf.quantizing.source_blocks import blocks_line

if TYPE_CHECKING:
    from reap2gguf.building.needs.estimate import Estimate, KnownCoverage
    from reap2gguf.building.plan import Plan
    from reap2gguf.gguf_files.activation_statistics import ExpertHits
    from reap2gguf.quantizing.resolve import ResolvedRecipe

_FEWEST = 32  # experts of a source that is worth the advice
_SHOWN_NAMES = 2


def choice_lines(plan: Plan) -> Iterator[str]:
    """What chooses the experts without observations, and which stay whatever they score."""
    if plan.given_kept is not None:
        yield f"the experts that stay are those of {plan.given_kept.file}: no pass observes them"
    if plan.ranks_by_weights:
        yield f"experts are ranked by their weights alone ({plan.method}): no pass observes them"
    if plan.merges:
        yield f"experts are merged into those that stay ({plan.method}), in a pass of its own"
    if plan.target.prunes:
        if plan.options.protect:
            yield f"protected, whatever they score: {plan.options.protect}"
        if plan.options.protect_super_experts:
            yield "super experts are protected, by the outliers that are observed of them"


def expert_count_lines(plan: Plan) -> Iterator[str]:
    """Where vLLM and llama.cpp are slower with the experts that stay, and with how many not."""
    facts, target = plan.model.facts, plan.target
    if not target.prunes or facts.n_experts < _FEWEST:
        return
    kept, needed = target.n_kept, facts.experts_per_token
    friendly = friendly_count(target, needed)
    if friendly != kept:
        yield (
            f"vLLM has no fused kernels for {kept} experts, but for {friendly}: "
            f"--keep-experts {friendly}"
        )
    if facts.n_groups > 1:
        yield (
            f"llama.cpp on CUDA never fuses the top-k of a router with groups of experts "
            f"({facts.n_groups} here), whatever the count"
        )
    elif not is_fused(kept):
        counts = fused_counts(target, needed)
        instead = f", but that of {' or '.join(map(str, counts))}" if counts else ""
        yield f"llama.cpp on CUDA does not fuse the top-k of {kept} experts{instead}"


def odd_row_lines(recipe: ResolvedRecipe) -> Iterator[str]:
    """The types that tensors get since their rows do not fill the blocks of the one meant."""
    groups: dict[tuple[int, str, str], dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for entry in recipe.table:
        if entry.wanted is not None and not entry.is_as_stored:
            name = re.sub(r"^blk\.\d+\.", "", entry.tensor.name).removesuffix(".weight")
            key = entry.tensor.n_columns, entry.tensor_type.name, entry.wanted.name
            groups[key][name] += 1
    for (columns, found, wanted), names in groups.items():
        some = ", ".join(list(names)[:_SHOWN_NAMES]) + (
            ", ..." if len(names) > _SHOWN_NAMES else ""
        )
        yield (
            f"rows of {columns:,} do not fill blocks of {wanted}: {sum(names.values())} tensors "
            f"({some}) are {found}"
        )


def copied_lines(recipe: ResolvedRecipe) -> Iterator[str]:
    """How many tensors of a file hold the checkpoint's own blocks, if any do."""
    of_source = blocks_line(recipe)
    if of_source:
        yield of_source
    copied = [entry for entry in recipe.table if entry.is_as_stored]
    if not copied or recipe.n_sliced == len(recipe.table):
        return
    kept = copied[0].tensor_type.name
    others = sorted({entry.wanted.name for entry in copied if entry.wanted is not None})
    instead = f"; as {' or '.join(others)} they would take no fewer bits" if others else ""
    yield f"{len(copied)} tensors stay in the {kept} that they are stored in, bit for bit{instead}"


def coverage_lines(known: KnownCoverage) -> Iterator[str]:
    """How many tokens the experts have seen, where that is known before the build."""
    for line in known.observed_lines:
        yield line if line.startswith("warning: ") else f"observed {line}"
    if known.importance is not None:
        yield f"importance matrix: {hits_line(known.importance.tokens)}"


def covered_experts(plan: Plan, known: KnownCoverage) -> list[ExpertHits]:
    """The tokens of the experts of every tensor, or of one tensor of each layer."""
    if plan.imatrix is not None and plan.imatrix.cut_from is None:
        return list(plan.imatrix.coverage.experts)
    if known.importance is None:
        return []
    return [
        expert_hits_of(f"blk.{layer}.ffn_down_exps.weight", tokens, FEW)
        for layer, tokens in known.importance.tokens.items()
    ]


def coverage_as_json(known: KnownCoverage) -> dict[str, Any]:
    """The same for programs, with the tokens of every expert."""
    return {
        "observations": None if known.observed is None else asdict(known.observed),
        "imatrix": None if known.importance is None else asdict(known.importance),
    }


def quality_line(plan: Plan, needs: Estimate) -> str:
    """Whether perplexity and KL divergence are measured, and on how much text."""
    if not (n_chunks := needs.n_scored_chunks):
        why = "" if plan.options.evaluate == "never" else "; --evaluate always measures it"
        return f"quality: not measured{why}"
    pruned = ", the pruned model" if plan.writes_hf else ""
    return (
        f"quality: the source{pruned} and every GGUF file are measured on {n_chunks} chunks of "
        f"{CHUNK} tokens"
    )
