"""What was pruned before: a source that this program has made says so in its own record.

A bundle has a manifest, a folder of `prune` has `kept_experts.json`. The record of a source is a
stranger's file. It is compared with the source's tensors, and what does not fit is not repeated.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from reap2gguf.bundle.bounds import check_kept
from reap2gguf.bundle.layout import KEPT_FILE, MANIFEST_FILE
from reap2gguf.bundle.manifest import EarlierPruning, Manifest, earlier_pruning
from reap2gguf.checkpoint.config import read_json
from reap2gguf.errors import ArtifactError, CheckpointError
from reap2gguf.exporting.header_facts import (
    COUNT_KEY,
    METHOD_KEY,
    ORIGINAL_PREFIX,
    SOURCE_KEY,
    VERSION_KEY,
    pruning_values,
)
from reap2gguf.pruning.methods import RECORDED

if TYPE_CHECKING:
    from pathlib import Path

    from reap2gguf.checkpoint.checkpoint import Checkpoint
    from reap2gguf.gguf_files.reader import GgufHeader
    from reap2gguf.hub.retry import Note
    from reap2gguf.hub.source import Source
    from reap2gguf.models.description import HeaderValue, ModelFacts
    from reap2gguf.pruning.select import Kept

ORIGINAL = "original"  # the key of the file of `prune`
_OWN_PREFIX = "reap2gguf."
_MOST_LETTERS = 256  # of a text that is repeated
_LABEL = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class History:
    """The original that a source was pruned from, and which of its experts the source has."""

    label: str
    revision: str | None
    n_experts: int  # per layer, in the original
    methods: tuple[str, ...]
    experts: Mapping[int, Sequence[int]]  # layer -> the original's id of each expert of the source

    def after(self, kept: Kept) -> EarlierPruning:
        """The record for a bundle that keeps these experts of the source."""
        originals = {
            layer: tuple(self.experts[layer][expert] for expert in ids)
            for layer, ids in kept.items()
        }
        return EarlierPruning(self.label, self.revision, self.n_experts, self.methods, originals)


def read_history(checkpoint: Checkpoint, facts: ModelFacts, note: Note) -> History | None:
    """What the record beside a checkpoint says of earlier prunings; None if nothing.

    A record that is broken or does not fit the checkpoint is reported to `note` and ignored.
    """
    if checkpoint.gguf is not None:
        return _history_in(checkpoint.gguf, facts, note)
    manifest, kept = (checkpoint.folder / name for name in (MANIFEST_FILE, KEPT_FILE))
    path = manifest if manifest.is_file() else kept
    if not path.is_file():
        return None
    try:
        if path == kept:
            return _history_of_prune(kept, facts)
        return _history(Manifest.load(checkpoint.folder), checkpoint, facts)
    except (ArtifactError, CheckpointError, KeyError, TypeError, ValueError) as error:
        found = str(error).removeprefix(f"{path}: ")
        note(f"{path}: does not fit this checkpoint ({found}); an earlier pruning is not recorded")
        return None


def _history(manifest: Manifest, checkpoint: Checkpoint, facts: ModelFacts) -> History | None:
    """Raises ValueError if the manifest is not that of this checkpoint."""
    pruning, source, hf = manifest.pruning, manifest.source, manifest.hf
    if hf is None:
        raise ValueError("it records no safetensors")
    for name, found, expected in (
        ("architecture", source.architecture, facts.architecture),
        ("n_kept", pruning.n_kept, facts.n_experts),
        ("experts_per_token", pruning.experts_per_token, facts.experts_per_token),
        ("n_parameters", hf.n_parameters, checkpoint.n_parameters),
        ("n_bytes", hf.n_bytes, checkpoint.n_bytes),
    ):
        if found != expected:
            raise ValueError(f"{name} is {found}, expected {expected}")
    earlier = source.earlier
    if earlier is None and pruning.n_kept == pruning.n_experts:
        return None  # a bundle with all experts
    history = (
        History(source.label, source.revision, pruning.n_experts, (), pruning.kept)
        if earlier is None
        else History(
            earlier.label, earlier.revision, earlier.n_experts, tuple(earlier.methods), earlier.kept
        )
    )
    methods = history.methods
    if pruning.n_kept < pruning.n_experts:
        methods = (*methods, pruning.method)
    _check(history, methods, facts)
    experts = {layer: history.experts[layer] for layer in facts.moe_layers}
    return History(history.label, history.revision, history.n_experts, methods, experts)


def original_of(
    source: Source, checkpoint: Checkpoint, facts: ModelFacts, kept: Kept, method: str
) -> EarlierPruning:
    """What a folder of `prune` records, for the day when it is a source itself."""
    history = read_history(checkpoint, facts, lambda line: None)
    if history is None:
        history = History(source.label, source.revision, facts.n_experts, (), _everything(facts))
    return replace(history, methods=(*history.methods, method)).after(kept)


def repeated_pruning(
    checkpoint: Checkpoint, facts: ModelFacts, note: Note
) -> tuple[HeaderValue, ...]:
    """The keys by which a pruned GGUF file says so, for another file of the same experts.

    None for another source, or for keys that do not fit it; that is reported to `note`.
    """
    header = checkpoint.gguf
    history = None if header is None else _history_in(header, facts, note)
    if header is None or history is None:
        return ()
    keys = header.metadata
    try:
        texts = [_short_text(keys.get(key)) for key in (SOURCE_KEY, METHOD_KEY, VERSION_KEY)]
        own = _recorded_in(header, facts, _OWN_PREFIX)
    except ValueError as error:
        note(_unfit(header, error))
        return ()
    earlier = history.after(_everything(facts)) if _has_original(header) else None
    source, method, version = texts
    return tuple(pruning_values(source, method, own.n_experts, own.experts, version, earlier))


def _everything(facts: ModelFacts) -> dict[int, tuple[int, ...]]:
    """All experts of a model, by layer."""
    return {layer: tuple(range(facts.n_experts)) for layer in facts.moe_layers}


def _history_of_prune(path: Path, facts: ModelFacts) -> History | None:
    """Raises CheckpointError, KeyError, TypeError or ValueError if it is not this checkpoint's."""
    values = read_json(path)
    if values.get(ORIGINAL) is None:
        return None  # of a version that did not record it
    found = earlier_pruning(values[ORIGINAL])
    check_kept("kept of the original", found.kept, found.n_experts)
    experts = {layer: found.kept.get(layer, ()) for layer in facts.moe_layers}
    methods = tuple(found.methods)
    history = History(found.label, found.revision, found.n_experts, methods, experts)
    _check(history, methods, facts)
    return history


def _history_in(header: GgufHeader, facts: ModelFacts, note: Note) -> History | None:
    """What the keys of a GGUF file of this program say, of the original where there was one."""
    prefix = ORIGINAL_PREFIX if _has_original(header) else _OWN_PREFIX
    if f"{prefix}kept_experts" not in header.metadata:
        return None
    try:
        return _recorded_in(header, facts, prefix)
    except ValueError as error:
        note(_unfit(header, error))
        return None


def _has_original(header: GgufHeader) -> bool:
    return f"{ORIGINAL_PREFIX}source" in header.metadata


def _unfit(header: GgufHeader, error: ValueError) -> str:
    found = f"{header.path}: its reap2gguf.* keys do not fit it ({error})"
    return f"{found}; an earlier pruning is not recorded"


def _recorded_in(header: GgufHeader, facts: ModelFacts, prefix: str) -> History:
    """What the keys with a prefix say: of the original, or of the source. ValueError if unfit."""
    keys = header.metadata
    methods = () if (method := keys.get(METHOD_KEY)) is None else (method,)
    count = keys.get(COUNT_KEY if prefix == _OWN_PREFIX else f"{prefix}expert_count")
    label, flat = keys.get(f"{prefix}source"), keys.get(f"{prefix}kept_experts")
    if not isinstance(label, str) or type(count) is not int or not isinstance(flat, list):
        raise ValueError("its keys are incomplete")
    each, layers = facts.n_experts, facts.moe_layers
    if len(flat) != each * len(layers) or not all(type(one) is int for one in flat):
        raise ValueError(f"it names {len(flat)} kept experts")
    if min(flat) < 0 or max(flat) >= count:
        raise ValueError("it names experts that the original did not have")
    experts = {layer: tuple(flat[at * each : (at + 1) * each]) for at, layer in enumerate(layers)}
    # of a file on the Hub, the repository
    history = History(label.partition(":")[0], None, count, methods, experts)
    _check(history, methods, facts)
    return history


def _short_text(value: object) -> str:
    if not isinstance(value, str) or len(value) > _MOST_LETTERS or not value.isprintable():
        raise ValueError("its source, method or version is no short text")
    return value


def _check(history: History, methods: Sequence[str], facts: ModelFacts) -> None:
    if not _LABEL.fullmatch(history.label):
        raise ValueError("its source is not the name of a model")
    if history.revision is not None and not _COMMIT.fullmatch(history.revision):
        raise ValueError("the revision of its source is not a commit")
    if any(method not in RECORDED for method in methods):
        raise ValueError("it names an unknown pruning method")
    for layer in facts.moe_layers:
        ids = list(history.experts.get(layer, ()))
        if len(ids) != facts.n_experts or ids != sorted(set(ids)):
            raise ValueError(
                f"layer {layer} has {len(ids)} ids of kept experts, expected {facts.n_experts} in "
                "ascending order"
            )
