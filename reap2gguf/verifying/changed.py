"""Verifies weights that a repair or a merge gave: by the hashes of the record that came with them.

They cannot be computed again from the source alone: that takes the text of the calibration, the
same kind of machine, and as long as the build took. All other weights are compared with the source.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from reap2gguf.bundle.layout import KEPT_FILE
from reap2gguf.bundle.manifest import merge_record, repair_record
from reap2gguf.bundle.records import MergeRecord, RepairRecord
from reap2gguf.checkpoint.config import read_json
from reap2gguf.errors import ArtifactError, CheckpointError
from reap2gguf.files import is_own_file
from reap2gguf.merging.limits import merged_layers
from reap2gguf.messages import shown
from reap2gguf.pruning.layer_files import tensors_sha256
from reap2gguf.pruning.replaced import ReplacedView
from reap2gguf.repairing.limits import repaired_layers
from reap2gguf.verifying.choice import asked_repairs

if TYPE_CHECKING:
    from pathlib import Path

    from reap2gguf.bundle.manifest import Manifest
    from reap2gguf.checkpoint.checkpoint import Checkpoint
    from reap2gguf.models.contract import MoeModel
    from reap2gguf.pruning.view import PrunedView
    from reap2gguf.verifying.report import Findings

Change = RepairRecord | MergeRecord


def not_repeated(change: Change) -> str:
    """What a verification leaves undone."""
    return (
        f"the {change.what} of the experts is not computed again: its weights are compared with "
        "the recorded hashes"
    )


def needs_folder(change: Change) -> str:
    """Why GGUF files are not compared with the source alone."""
    return (
        f"values not compared with the source: the {change.word} weights are not in it; put the "
        "safetensors folder beside the files"
    )


def read_change(folder: Path) -> Change | None:
    """The repair or merge in `kept_experts.json`; None without one. Raises ArtifactError."""
    path, name = folder / KEPT_FILE, ""
    try:
        values = read_json(path)
        for name, decode in (("repair", repair_record), ("merge", merge_record)):
            if values.get(name) is not None:
                return decode(values[name])
        return None
    except (CheckpointError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(f"{path}: {name} is not a complete record ({shown(error)})") from error


def take_recorded(
    folder: Path, opened: tuple[Checkpoint, MoeModel], found: Findings
) -> Change | None:
    """Compare the new weights of a folder of `prune` with the hashes that its record has.

    What differs goes to `found`, and what is left undone. None without a record of a repair or a
    merge. Raises ArtifactError if the record is malformed.
    """
    if not is_own_file(folder / KEPT_FILE) or (change := read_change(folder)) is None:
        return None
    found.take(check_changed(change, *opened, True), folder.name)
    found.not_checked.append(not_repeated(change))
    return change


def changed_names(change: Change, checkpoint: Checkpoint, model: MoeModel, layer: int) -> set[str]:
    """The tensors of a layer that have new values."""
    tensors = model.expert_tensors(layer, checkpoint.tensors)
    if isinstance(change, RepairRecord):
        slabs = tensors["down"].slabs if change.layers[layer].sha256 else ()
        return {slab.stored for slab in slabs}
    numbers = [n for n, group in enumerate(change.layers[layer].groups) if len(group) > 1]
    return {tensor.slabs[number].stored for tensor in tensors.values() for number in numbers}


def check_changed(
    change: Change, checkpoint: Checkpoint, model: MoeModel, reads_values: bool
) -> Iterator[str]:
    """Violations in the new weights of an opened folder. Raises CheckpointError."""
    where, is_merge = checkpoint.folder.name, isinstance(change, MergeRecord)
    expected = merged_layers(model) if is_merge else repaired_layers(model)
    if (found := sorted(change.layers)) != expected:
        yield f"{where}: the {change.what} is of layers {shown(found)}, expected {shown(expected)}"
        return
    if isinstance(change, MergeRecord):
        for layer, merged in change.layers.items():
            if (n_groups := len(merged.groups)) != model.facts.n_experts:
                yield (
                    f"{where}: the merge is recorded to have given layer {layer} {n_groups} "
                    f"experts, expected {model.facts.n_experts}"
                )
                return
    n_tensors = 0
    for layer, one in change.layers.items():
        names = changed_names(change, checkpoint, model, layer)
        n_tensors += len(names)
        if reads_values and names and tensors_sha256(checkpoint, names) != one.sha256:
            matrices = "the experts" if is_merge else "down_proj of the experts"
            yield (
                f"{where}: {matrices} of layer {layer} is not what the {change.what} gave: its "
                "SHA-256 is another than the one that was recorded"
            )
    if n_tensors != change.n_tensors:
        yield (
            f"{where}: the {change.what} is recorded to have given {change.n_tensors} tensors, "
            f"expected {n_tensors}"
        )


def check_option(manifest: Manifest) -> Iterator[str]:
    """The options that asked for other weights, against what is recorded of them."""
    options, (expected,) = manifest.options, asked_repairs(manifest)
    if options is None:
        return
    if options.repair != expected:
        yield f"options.repair is {shown(options.repair)}, expected {expected}"
    merge = manifest.pruning.merge
    size = None if merge is None else merge.group_size
    if options.group_size != size:
        yield f"options.group_size is {shown(options.group_size)}, expected {size}"


def with_changed(view: PrunedView, change: Change, folder: Checkpoint) -> PrunedView:
    """The pruned source with the new weights of a folder, which `check_changed` checks.

    Raises CheckpointError if they are of another type or shape.
    """
    names: set[str] = set()
    for layer in change.layers.keys() & view.kept.keys():
        names |= changed_names(change, folder, view.model, layer)
    if missing := names - folder.tensors.keys():
        raise CheckpointError(f"{folder.folder}: no tensor {min(missing)!r}")
    return ReplacedView(view, folder, names)
