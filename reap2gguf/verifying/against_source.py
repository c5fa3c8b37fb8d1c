"""Compares a bundle with the model that was pruned: which one it is, and every byte that was kept.

Without it, a bundle can only be compared with itself, and weights that were wrong before the first
file was written agree everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from reap2gguf.bundle.layout import KEPT_FILE, MANIFEST_FILE
from reap2gguf.checkpoint.config import read_json, read_optional
from reap2gguf.checkpoint.quantized.keys import sections_of
from reap2gguf.errors import ArtifactError, CheckpointError, Reap2ggufError
from reap2gguf.files import cached_blob
from reap2gguf.messages import shown
from reap2gguf.models.table import describe
from reap2gguf.pruning.view import PrunedView
from reap2gguf.verifying.context import PrunedSource
from reap2gguf.verifying.facts import check_source_facts

if TYPE_CHECKING:
    from reap2gguf.bundle.manifest import Manifest
    from reap2gguf.checkpoint.checkpoint import Checkpoint
    from reap2gguf.hub.source import Source
    from reap2gguf.pruning.select import Kept

_MAX_KEPT_LAYERS = 2**12
_MAX_KEPT_IDS = 2**17


@dataclass(frozen=True)
class OpenSource:
    """The model that was pruned, as the user named it, with its checkpoint open."""

    source: Source
    checkpoint: Checkpoint

    @property
    def _is_of_hub(self) -> bool:
        """Whether its fingerprint is of the hashes on the Hub, and not of samples of the bytes."""
        shards = self.checkpoint.shards
        return self.source.snapshot is not None or any(map(cached_blob, shards))

    def pruned(self, manifest: Manifest) -> PrunedSource:
        """What a bundle must hold, by its manifest and this source."""
        checkpoint, label = self.checkpoint, self.source.label
        not_checked = []
        fingerprint = checkpoint.fingerprint()
        if fingerprint != manifest.source.fingerprint:
            if self._is_of_hub == (manifest.source.revision is not None):
                violation = (
                    f"{MANIFEST_FILE}: the bundle was not made from {label}: it was made from "
                    f"{shown(manifest.source.label)} with the fingerprint "
                    f"{shown(manifest.source.fingerprint[:16])}, that of {label} is "
                    f"{fingerprint[:16]!r}; pass the model that was pruned to --source"
                )
                not_compared = "values of the source not compared: it is another model"
                return PrunedSource(None, (violation,), (not_compared,))
            not_checked.append(
                "fingerprint of the source not compared: a download from the Hub and a folder have "
                "different ones for the same model"
            )
        kept = {layer: tuple(ids) for layer, ids in manifest.pruning.kept.items()}
        state = manifest.pruning.mtp.state
        view, violations = _prune(checkpoint, kept, state)
        if manifest.hf is not None and checkpoint.decoding is not None:
            n_bytes = manifest.hf.n_bytes
            if view is None or view.n_bytes != n_bytes:
                other, found = _prune(checkpoint.dequantized(), kept, state)
                if other is not None and other.n_bytes == n_bytes:
                    view, violations = other, found
        if view is not None:
            model = describe(checkpoint, state != "dropped")
            violations += check_source_facts(manifest, checkpoint, model)
        return PrunedSource(view, tuple(violations), tuple(not_checked))

    def pruned_by_record(self, folder: Path) -> PrunedSource:
        """What a folder of `prune` must hold, by its record of kept experts."""
        try:
            kept, config = read_kept(folder), read_optional(folder, "config.json")
        except (ArtifactError, CheckpointError) as error:
            return PrunedSource(None, (str(error),))
        checkpoint = self.checkpoint
        if not sections_of(config):
            checkpoint = checkpoint.dequantized()  # it was pruned so, if it was quantized
        view, violations = _prune(checkpoint, kept, "")
        return PrunedSource(view, tuple(violations))


def _prune(
    checkpoint: Checkpoint, kept: Kept, mtp_state: str
) -> tuple[PrunedView | None, list[str]]:
    """The view of a source; with an unknown state, its MTP block counts if experts of it do."""
    try:
        model = describe(checkpoint, mtp_state != "dropped")
        if not mtp_state and model.facts.has_mtp and model.facts.mtp_layer not in kept:
            model = describe(checkpoint, keep_mtp=False)
        return PrunedView(checkpoint, model, kept), []
    except Reap2ggufError as error:
        return None, [f"{checkpoint.folder.name} (the source): {error}"]


def read_kept(folder: Path) -> Kept:
    """The experts of each layer in `kept_experts.json`; ArtifactError if it is malformed."""
    path = folder / KEPT_FILE
    try:
        layers = read_json(path).get("kept_experts")
    except CheckpointError as error:
        raise ArtifactError(str(error)) from error
    if not isinstance(layers, dict) or not 0 < len(layers) <= _MAX_KEPT_LAYERS:
        raise ArtifactError(f"{path}: kept_experts is {shown(layers)}, expected lists by layer")
    return dict(_layers(path, layers))


def _layers(path: Path, layers: dict[str, object]) -> Iterator[tuple[int, tuple[int, ...]]]:
    for layer, ids in layers.items():
        is_number = layer.isascii() and layer.isdigit() and str(int(layer[:9])) == layer
        is_list = isinstance(ids, list) and len(ids) <= _MAX_KEPT_IDS
        if not is_number or not is_list or not all(type(one) is int for one in ids):  # type: ignore[attr-defined]
            raise ArtifactError(
                f"{path}: layer {shown(layer)} keeps {shown(ids)}, expected numbers of experts"
            )
        yield int(layer), tuple(ids)  # type: ignore[arg-type]
