"""Experts that the user names: a map of the ids that each layer keeps, such as `prune` writes.

It is untrusted: it is read when the plan is made, and compared with the model before any work.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from reap2gguf.bundle.bounds import kept_layers
from reap2gguf.bundle.manifest import hash_file
from reap2gguf.checkpoint.config import read_json
from reap2gguf.errors import ArtifactError, CheckpointError, UsageError
from reap2gguf.messages import one_line, shown
from reap2gguf.pruning.select import choose_target

if TYPE_CHECKING:
    from reap2gguf.models.description import ModelFacts
    from reap2gguf.options import BuildOptions
    from reap2gguf.pruning.select import Kept, Target

_LAYERS = "kept_experts"  # the key of the file of `prune`, and of a list in a manifest's `pruning`


@dataclass(frozen=True)
class GivenKept:
    """A map of kept experts: the name and hash of its file for the records, and what it holds."""

    file: str
    sha256: str
    kept: Kept  # ascending ids
    target: Target


def given_kept_of(options: BuildOptions, facts: ModelFacts) -> GivenKept | None:
    """The map that a build was given, if any. Raises what `read_kept_map` raises.

    UsageError beside options that choose experts too, and for a map that keeps all of them.
    """
    if options.kept is None:
        return None
    refuse_beside_kept(options, options.observations)
    found = read_kept_map(options.kept, facts)
    if not found.target.prunes:
        raise UsageError(
            f"--kept {options.kept}: it keeps all {facts.n_experts} experts of each layer; leave "
            "it out, and pass --compression 0"
        )
    return found


def read_kept_map(path: Path, facts: ModelFacts) -> GivenKept:
    """A map that fits a model. Raises ArtifactError if it is broken or of another model.

    The file is the `kept_experts.json` of `prune`, the `reap2gguf.json` of a bundle, or an object
    with the ids of each layer alone: {"0": [0, 5, 7], "1": [...]}.
    """
    file = Path(os.path.realpath(os.path.expanduser(path)))
    try:
        found = read_json(file)
        sha256 = hash_file(file).sha256
    except CheckpointError as error:
        raise ArtifactError(f"{path}: {error}".replace(f"{path}: {file}: ", f"{path}: ")) from error
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read ({error.strerror or error})") from error
    kept = check_kept_map(_layers_in(found), facts, str(path))
    target = choose_target(facts, len(next(iter(kept.values()))), None)
    return GivenKept(one_line(path.name), sha256, kept, target)


def _layers_in(values: Mapping[str, Any]) -> Any:
    if _LAYERS in values:
        return values[_LAYERS]
    pruning = values.get("pruning")
    return pruning.get("kept") if isinstance(pruning, dict) else values


def check_kept_map(values: Any, facts: ModelFacts, where: str) -> dict[int, tuple[int, ...]]:
    """The experts that each layer keeps, ascending, from {"0": [5, 3], ...} or with numbers as
    keys.

    Raises ArtifactError unless every MoE layer of the model, and no other, keeps the same number of
    its experts, and every group of the router too; UsageError for a number that the model cannot
    run with.
    """
    if isinstance(values, Mapping):
        values = {str(layer): _as_list(ids) for layer, ids in values.items()}
    try:
        layers = kept_layers(values, "the map")
    except (TypeError, ValueError) as error:
        raise ArtifactError(
            f'{where}: {error}; expected the kept experts of each layer, such as {{"0": [0, 5, 7]}}'
        ) from error
    if missing := [layer for layer in facts.moe_layers if layer not in layers]:
        raise ArtifactError(
            f"{where}: layer {missing[0]} is missing ({len(missing)} of {len(facts.moe_layers)} "
            "MoE layers); the map must name the kept experts of each of them"
        )
    if strange := sorted(layers.keys() - set(facts.moe_layers)):
        raise ArtifactError(
            f"{where}: layer {strange[0]} has no experts in this model, whose MoE layers are "
            f"{shown(list(facts.moe_layers))}; is the map of another model?"
        )
    first = facts.moe_layers[0]
    for layer in facts.moe_layers:
        _check_layer(layers[layer], layer, facts, where)
        if len(layers[layer]) != len(layers[first]):
            raise ArtifactError(
                f"{where}: layer {layer} keeps {len(layers[layer])} experts and layer {first} "
                f"{len(layers[first])}; every layer must keep the same number"
            )
    choose_target(facts, len(layers[first]), None)
    for layer in facts.moe_layers:
        _check_groups(layers[layer], layer, facts, where)
    return {layer: tuple(sorted(layers[layer])) for layer in facts.moe_layers}


def _as_list(ids: Any) -> Any:
    return list(ids) if isinstance(ids, tuple) else ids


def _check_layer(ids: tuple[int, ...], layer: int, facts: ModelFacts, where: str) -> None:
    if not ids:
        raise ArtifactError(f"{where}: layer {layer} keeps no experts")
    if max(ids) >= facts.n_experts:
        raise ArtifactError(
            f"{where}: layer {layer} keeps expert {max(ids)}, and the model has 0 to "
            f"{facts.n_experts - 1}; the ids are those of the source"
        )
    if len(set(ids)) < len(ids):
        twice = next(one for one in ids if ids.count(one) > 1)
        raise ArtifactError(f"{where}: layer {layer} keeps expert {twice} twice")


def _check_groups(ids: tuple[int, ...], layer: int, facts: ModelFacts, where: str) -> None:
    size, each = facts.n_experts // facts.n_groups, len(ids) // facts.n_groups
    for group in range(facts.n_groups):
        if (count := sum(one // size == group for one in ids)) != each:
            raise ArtifactError(
                f"{where}: layer {layer} keeps {count} experts of the router's group {group}, "
                f"expected {each} of each of the {facts.n_groups} groups"
            )


class Choosing(Protocol):
    """Options that choose experts in another way."""

    @property
    def keep_experts(self) -> int | None: ...
    @property
    def compression(self) -> float | str | None: ...
    @property
    def method(self) -> str: ...
    @property
    def protect(self) -> str: ...
    @property
    def protect_super_experts(self) -> bool: ...


def refuse_beside_kept(options: Choosing, observations: object | None) -> None:
    """Raise UsageError for options that choose experts beside a map that names them."""
    others = {
        "--keep-experts": options.keep_experts is not None,
        "--compression": options.compression is not None,
        "--observations": observations is not None,
        f"--method {options.method}": options.method != "reap",
        "--protect": bool(options.protect),
        "--protect-super-experts": options.protect_super_experts,
    }
    if given := [name for name, is_given in others.items() if is_given]:
        raise UsageError(
            f"--kept names the experts that stay, and {given[0]} chooses them too; leave one of "
            "both out"
        )
