"""Which experts `select` and `prune` keep."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from reap2gguf.errors import UsageError
from reap2gguf.machine import available_threads
from reap2gguf.options import check_bool, check_choice, check_path
from reap2gguf.pruning.methods import GIVEN, METHODS, merges
from reap2gguf.pruning.protection import Protection, read_pinned

if TYPE_CHECKING:
    from reap2gguf.api.opening import PathLike
    from reap2gguf.artifacts.observations import Observations
    from reap2gguf.hub.opened import OpenModel
    from reap2gguf.progress import Progress


@dataclass(frozen=True)
class Selection:
    """The experts that each layer keeps."""

    method: str  # the criterion
    n_experts: int  # per layer, before
    n_kept: int  # per layer, after
    kept: Mapping[int, tuple[int, ...]]  # layer -> ids of the experts in the source, ascending
    notes: tuple[str, ...] = ()  # tokens per expert, and warnings about scores that are noisy
    # layer -> ids of those that stay whatever they score
    protected: Mapping[int, tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Wanted:
    """How many experts are to stay, and which."""

    keep_experts: int | None
    compression: float | None
    method: str
    protect: str
    protect_super_experts: bool
    kept: Mapping[int, Sequence[int]] | PathLike | None

    def __post_init__(self) -> None:
        """Raises UsageError for what no model can have."""
        check_choice("method", self.method, METHODS)
        check_bool("protect_super_experts", self.protect_super_experts)
        read_pinned(self.protect)

    @property
    def protection(self) -> Protection:
        """The experts that stay whatever they score."""
        return Protection(read_pinned(self.protect), self.protect_super_experts)


def chosen(
    opened: OpenModel,
    observations: Observations | PathLike | None,
    wanted: Wanted,
    progress: Progress,
) -> Selection:
    """The experts of an open model that stay. Raises what `select` raises."""
    from reap2gguf.building.given import check_needs_observations
    from reap2gguf.pruning.coverage import selection_notes
    from reap2gguf.pruning.protection import protected_experts, protection_notes
    from reap2gguf.pruning.select import choose_target, keep_best, select_experts
    from reap2gguf.pruning.weight_scores import weight_scores

    if wanted.kept is not None:
        return _given(opened, observations, wanted, wanted.kept)
    method, facts = wanted.method, opened.model.facts
    if merges(method):
        raise UsageError(
            f"--method {method} finds the experts that stay while it merges the others; run "
            f"`reap2gguf prune --method {method}`, whose kept_experts.json lists them"
        )
    check_needs_observations(method, observations)
    target = choose_target(facts, wanted.keep_experts, wanted.compression)
    seen = None if observations is None else _observations(opened, observations)
    found = protected_experts(wanted.protection, seen, target, facts)
    notes = protection_notes(found, wanted.protection)
    if seen is None:
        threads = available_threads()
        scores = weight_scores(opened.checkpoint, opened.model, method, progress, threads)
        kept = keep_best(scores, target, facts, found.all)
    else:
        kept = select_experts(seen, method, target, facts, found.all)
        notes = [*selection_notes(seen, kept), *notes]
    return Selection(method, target.n_experts, target.n_kept, kept, tuple(notes), found.all)


def _given(
    opened: OpenModel,
    observations: Observations | PathLike | None,
    wanted: Wanted,
    kept: Mapping[int, Sequence[int]] | PathLike,
) -> Selection:
    """The experts that the user named."""
    from reap2gguf.pruning.given_kept import (
        check_kept_map,
        read_kept_map,
        refuse_beside_kept,
    )

    refuse_beside_kept(wanted, observations)
    facts = opened.model.facts
    if isinstance(kept, Mapping):
        found = check_kept_map(kept, facts, "kept")
    else:
        found = dict(read_kept_map(check_path("kept", kept), facts).kept)
    return Selection(GIVEN, facts.n_experts, len(found[facts.moe_layers[0]]), found)


def _observations(opened: OpenModel, observations: Observations | PathLike) -> Observations:
    """Observations that were given, of the model that is open."""
    from reap2gguf.artifacts.observations import Observations
    from reap2gguf.building.given import check_same_model

    if isinstance(observations, Observations):
        seen, where = observations, "observations"
    else:
        seen = Observations.load(Path(os.path.realpath(observations)))  # the user named it
        where = str(observations)
    check_same_model(seen, opened.checkpoint, where)
    return seen
