"""Which experts a build keeps, by what its plan says: all, or those with the highest scores.

Scores of weights alone take a pass over all experts' weights. They are kept in the work folder, so
that an interrupted build does not read them again and a plan can say what a build will reuse.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from reap2gguf.atomic import write_whole
from reap2gguf.building.keys import WEIGHTS_FORMAT, stage_key
from reap2gguf.checkpoint.config import read_json
from reap2gguf.errors import CheckpointError
from reap2gguf.pruning.methods import is_from_weights
from reap2gguf.pruning.protection import ProtectedExperts, protected_experts
from reap2gguf.pruning.select import keep_best, select_experts
from reap2gguf.pruning.weight_scores import weight_scores

if TYPE_CHECKING:
    from reap2gguf.artifacts.observations import Observations
    from reap2gguf.building.plan import Plan
    from reap2gguf.building.stage import Run
    from reap2gguf.pruning.select import Kept, Scores

_SCORES_FILE = "weight-scores.json"


def chosen_experts(run: Run, seen: Observations | None) -> Kept:
    """The experts that stay, in the process that writes; `seen` is what the build has observed.

    Raises ArtifactError if observations are of another model, and what reading weights raises.
    """
    plan = run.plan
    if (kept := _without_weights(plan, seen)) is not None:
        return kept
    protected = protected_of(plan, seen).all
    key = _scores_key(run)
    scores = _stored_scores(run.work.root / _SCORES_FILE, key)
    if scores is None:
        threads = plan.options.compute.threads
        scores = weight_scores(plan.checkpoint, plan.model, plan.method, run.progress, threads)
        layers = {str(layer): values.tolist() for layer, values in scores.items()}
        write_whole(run.work.root / _SCORES_FILE, json.dumps({"key": key, "layers": layers}))
    return keep_best(scores, plan.target, plan.model.facts, protected)


def protected_of(plan: Plan, seen: Observations | None) -> ProtectedExperts:
    """The experts that stay whatever they score. Raises what `protected_experts` raises."""
    if not plan.target.prunes or plan.given_kept is not None:
        return ProtectedExperts()
    return protected_experts(plan.options.protection, seen, plan.target, plan.model.facts)


def known_choice(run: Run, seen: Observations | None) -> Kept | None:
    """The experts that a build will keep, as far as no weights have to be read for it."""
    if (kept := _without_weights(run.plan, seen)) is not None:
        return kept
    plan = run.plan
    scores = _stored_scores(run.work.root / _SCORES_FILE, _scores_key(run))
    if scores is None:
        return None
    return keep_best(scores, plan.target, plan.model.facts, protected_of(plan, seen).all)


def _without_weights(plan: Plan, seen: Observations | None) -> Kept | None:
    """The experts that stay, unless they are ranked by their weights."""
    if not plan.target.prunes:
        return dict.fromkeys(plan.model.facts.moe_layers, tuple(range(plan.target.n_kept)))
    if plan.given_kept is not None:
        return plan.given_kept.kept
    if is_from_weights(plan.method):
        return None
    assert seen is not None
    protected = protected_of(plan, seen).all
    return select_experts(seen, plan.method, plan.target, plan.model.facts, protected)


def _scores_key(run: Run) -> str:
    source = run.keys.fingerprint, run.plan.checkpoint.stamps()
    return stage_key(WEIGHTS_FORMAT, source, run.plan.method, run.plan.mtp)


def _stored_scores(path: Path, key: str) -> dict[int, Scores] | None:
    """The scores in the work folder; None if there are none with this key."""
    try:
        found = read_json(path)
        if found.get("key") != key:
            return None
        return {int(layer): np.array(values, float) for layer, values in found["layers"].items()}
    except (CheckpointError, KeyError, TypeError, ValueError, AttributeError):
        return None  # none yet, or damaged: they are computed again
