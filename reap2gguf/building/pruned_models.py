"""Which experts a pruned model keeps, and its GGUF tensors: of a bundle, or a folder of `prune`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from reap2gguf.bundle.layout import KEPT_FILE, MANIFEST_FILE, folders_of
from reap2gguf.bundle.manifest import Manifest
from reap2gguf.errors import ArtifactError, UsageError, VerificationError
from reap2gguf.files import is_plain
from reap2gguf.gguf_files.imatrix_coverage import shapes_of
from reap2gguf.gguf_files.imatrix_fit import n_blocks, n_experts_of
from reap2gguf.gguf_files.reader import read_gguf_header
from reap2gguf.gguf_files.split import read_whole_header
from reap2gguf.models.description import is_of_experts
from reap2gguf.models.gguf_keys import block_of
from reap2gguf.verifying.against_source import read_kept
from reap2gguf.verifying.hf_folder import open_folder

if TYPE_CHECKING:
    from reap2gguf.gguf_files.imatrix_fit import Kept, Shapes


@dataclass(frozen=True)
class Origin:
    """A model that was pruned, and which of its experts remain."""

    kept: Kept
    n_experts: int | None  # per layer; None: the folder does not say it

    def has(self, n_experts: int) -> bool:
        """Whether the model may have had so many experts in each layer."""
        if self.n_experts is not None:
            return self.n_experts == n_experts
        return max(max(ids, default=0) for ids in self.kept.values()) < n_experts


@dataclass(frozen=True)
class PrunedModel:
    """The GGUF tensors of a pruned model, and what it was made from.

    Of a source that was pruned before, the original is a second origin.
    """

    shapes: Shapes
    origins: tuple[Origin, ...]
    mtp_block: int | None = None

    @property
    def n_experts(self) -> int | None:
        """Experts of each layer that remain."""
        return n_experts_of(self.shapes)


def read_pruned(folder: Path) -> PrunedModel:
    """A pruned model, from either folder of a bundle or from what `prune` wrote.

    That is a folder, or a GGUF file, of several parts the first. Raises UsageError if it is none of
    these, ArtifactError if its record is broken, and VerificationError if its safetensors are.
    """
    if folder.is_file():
        return _of_pruned_gguf(folder)
    if is_plain(folder / MANIFEST_FILE):
        return _of_bundle(folder)
    if is_plain(folder / KEPT_FILE):
        shapes, mtp_block = _of_safetensors(folder, None)
        return PrunedModel(shapes, (Origin(read_kept(folder), None),), mtp_block)
    raise UsageError(
        f"{folder}: holds no {MANIFEST_FILE} and no {KEPT_FILE}, which say what experts a pruned "
        "model keeps; pass a folder of a bundle, or one that `prune` wrote"
    )


def _of_bundle(folder: Path) -> PrunedModel:
    manifest = Manifest.load(folder)
    origins = [Origin(_layers(manifest.pruning.kept), manifest.pruning.n_experts)]
    if (earlier := manifest.source.earlier) is not None:
        origins.append(Origin(_layers(earlier.kept), earlier.n_experts))
    folders = folders_of(folder, None if manifest.hf is None else manifest.hf.folder)
    hf = None if folders is None or manifest.hf is None else folders.hf
    if hf is not None and is_plain(hf / "config.json"):
        shapes, mtp_block = _of_safetensors(hf, manifest.pruning.n_kept)
        return PrunedModel(shapes, tuple(origins), mtp_block)
    gguf = folder if folders is None else folders.gguf
    for record in manifest.gguf:
        files = [gguf / name for name in record.files]
        if all(map(is_plain, files)):
            shapes, mtp_block = _of_gguf(files)
            return PrunedModel(shapes, tuple(origins), mtp_block)
    raise UsageError(
        f"{folder}: neither the safetensors nor a whole GGUF file of the bundle are there, so the "
        "names of its tensors are not known; download one of them too"
    )


def _of_pruned_gguf(path: Path) -> PrunedModel:
    """What a GGUF file says of itself. Raises UsageError for one that was not pruned here."""
    header = read_whole_header(path)
    shapes, mtp_block = _of_gguf([part.path for part in header.headers])
    blocks = (block_of(name) for name in shapes if is_of_experts(name))
    layers = sorted({block for block in blocks if block is not None})
    origins = []
    for prefix, count in (("", "source_expert_count"), ("original.", "original.expert_count")):
        kept = header.metadata.get(f"reap2gguf.{prefix}kept_experts")
        n_experts = header.metadata.get(f"reap2gguf.{count}")
        if not isinstance(kept, list) or type(n_experts) is not int or not layers:
            continue
        each = len(kept) // len(layers)
        if each != n_experts_of(shapes) or not all(type(one) is int for one in kept):
            raise ArtifactError(
                f"{path}: its reap2gguf.{prefix}kept_experts do not fit its tensors"
            )
        if not 0 <= min(kept) <= max(kept) < n_experts:
            raise ArtifactError(f"{path}: names experts that its source did not have")
        by_layer = {layer: kept[at * each : (at + 1) * each] for at, layer in enumerate(layers)}
        origins.append(Origin(_layers(by_layer), n_experts))
    if not origins:
        raise UsageError(
            f"{path}: does not say which experts it keeps; pass a GGUF file that `prune` or "
            "`build` wrote, or a folder of theirs"
        )
    return PrunedModel(shapes, tuple(origins), mtp_block)


def _layers(kept: Mapping[int, object]) -> Kept:
    return {int(layer): tuple(ids) for layer, ids in kept.items()}  # type: ignore[arg-type]


def _of_safetensors(folder: Path, n_kept: int | None) -> tuple[Shapes, int | None]:
    checkpoint, model, violations = open_folder(folder, n_kept)
    if checkpoint is None or model is None or violations:
        raise VerificationError(violations, "nothing was written")
    with checkpoint:
        block = model.facts.mtp_layer
        return shapes_of(model.gguf_tensors(checkpoint.tensors)), block


def _of_gguf(files: list[Path]) -> tuple[Shapes, int | None]:
    """Of all parts of a file; the blocks after the trunk's are of multi-token prediction."""
    shapes: dict[str, tuple[int, ...]] = {}
    n_next: object = 0
    for path in files:
        header = read_gguf_header(path)
        shapes |= {name: tensor.shape for name, tensor in header.tensors.items()}
        arch = header.metadata.get("general.architecture")
        n_next = header.metadata.get(f"{arch}.nextn_predict_layers", n_next)
    if type(n_next) is not int or not 0 <= n_next <= 1:
        raise ArtifactError(f"{files[0]}: has {n_next!r} multi-token-prediction blocks, expected 1")
    return shapes, n_blocks(shapes) - 1 if n_next else None
