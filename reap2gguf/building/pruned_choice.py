"""Why a folder of `prune` keeps its experts: what it recorded, and observations that agree."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from reap2gguf.artifacts.observations import Observations
from reap2gguf.building.given import check_same_model
from reap2gguf.bundle.bounds import kept_layers
from reap2gguf.bundle.layout import KEPT_FILE
from reap2gguf.bundle.manifest import NO_METHOD, hash_file
from reap2gguf.checkpoint.config import read_json
from reap2gguf.errors import ArtifactError, CheckpointError, UsageError
from reap2gguf.messages import one_line, shown
from reap2gguf.pruning.methods import OBSERVED, RECORDED
from reap2gguf.pruning.select import Target, select_experts

if TYPE_CHECKING:
    from reap2gguf.checkpoint.checkpoint import Checkpoint
    from reap2gguf.models.description import ModelFacts
    from reap2gguf.pruning.select import Kept


@dataclass(frozen=True)
class Choice:
    """The experts of each layer, by what they were chosen, and those kept whatever they scored."""

    kept: Kept
    method: str
    protected: Kept


def method_of(folder: Path) -> str:
    """The method that `prune` recorded."""
    path = folder / KEPT_FILE
    try:
        method = read_json(path).get("method")
    except CheckpointError as error:
        raise ArtifactError(str(error)) from error
    if method not in RECORDED:
        raise ArtifactError(
            f"{path}: method is {shown(method)}, expected one of {', '.join(RECORDED)}"
        )
    return str(method)


def protected_in(folder: Path, kept: Kept) -> Kept:
    """The experts that `prune` kept whatever they scored."""
    path = folder / KEPT_FILE
    try:
        found = kept_layers(read_json(path).get("protected", {}), "protected")
    except CheckpointError as error:
        raise ArtifactError(str(error)) from error
    except (TypeError, ValueError) as error:
        raise ArtifactError(f"{path}: {error}") from error
    for layer, ids in found.items():
        if strange := sorted(set(ids) - set(kept.get(layer, ()))):
            raise ArtifactError(
                f"{path}: protected names expert {strange[0]} of layer {layer}, which the folder "
                "does not keep"
            )
    return found


def observed(
    path: Path, checkpoint: Checkpoint, choice: Choice, facts: ModelFacts
) -> tuple[str, str, Observations]:
    """Name, hash and content of observations that chose these experts of a checkpoint.

    Raises ArtifactError if they chose others, UsageError if none were needed.
    """
    method = choice.method
    if method == NO_METHOD:
        raise UsageError(f"--observations {path}: nothing was pruned, so they chose no experts")
    if method not in OBSERVED:
        raise UsageError(
            f"--observations {path}: experts were chosen by {method}, which reads none; leave it "
            "out"
        )
    file = Path(os.path.realpath(path))
    seen = Observations.load(file)
    check_same_model(seen, checkpoint, str(path))
    n_kept = len(next(iter(choice.kept.values())))
    chosen = select_experts(seen, method, Target(facts.n_experts, n_kept), facts, choice.protected)
    if chosen != dict(choice.kept):
        layer = next(one for one, ids in chosen.items() if ids != choice.kept[one])
        raise ArtifactError(
            f"{path}: by {method}, these observations keep other experts in layer {layer} than the "
            "pruned folder; pass those that `prune` used, or leave them out"
        )
    return one_line(path.name), hash_file(file).sha256, seen
