"""Verifies the weights that a repair gave: by the hashes of the record that came with them.

They cannot be computed again from the source alone: that takes the text of the calibration, the
same kind of machine, and as long as the build took. All other weights are compared with the source.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from reap2gguf.errors import CheckpointError
from reap2gguf.messages import shown
from reap2gguf.pruning.layer_files import tensors_sha256
from reap2gguf.pruning.replaced import ReplacedView
from reap2gguf.repairing.limits import repaired_layers
from reap2gguf.verifying.choice import asked_repairs

if TYPE_CHECKING:
    from reap2gguf.bundle.manifest import Manifest
    from reap2gguf.bundle.records import RepairRecord
    from reap2gguf.checkpoint.checkpoint import Checkpoint
    from reap2gguf.models.contract import MoeModel
    from reap2gguf.pruning.view import PrunedView

NOT_REPEATED = (
    "the repair of the experts is not computed again: its weights are compared with the recorded "
    "hashes"
)
NEEDS_FOLDER = (
    "values not compared with the source: the repaired weights are not in it; put the safetensors "
    "folder beside the files"
)


def repaired_names(checkpoint: Checkpoint, model: MoeModel, layer: int) -> set[str]:
    """The tensors of a layer that a repair replaces."""
    slabs = model.expert_tensors(layer, checkpoint.tensors)["down"].slabs
    return {slab.stored for slab in slabs}


def check_repaired(
    repair: RepairRecord, checkpoint: Checkpoint, model: MoeModel, reads_values: bool
) -> Iterator[str]:
    """Violations in the repaired weights of an opened folder. Raises CheckpointError."""
    where = checkpoint.folder.name
    expected, found = repaired_layers(model), sorted(repair.layers)
    if found != expected:
        yield f"{where}: the repair is of layers {shown(found)}, expected {shown(expected)}"
        return
    n_tensors = 0
    for layer, one in repair.layers.items():
        if not one.sha256:
            continue
        names = repaired_names(checkpoint, model, layer)
        n_tensors += len(names)
        if reads_values and tensors_sha256(checkpoint, names) != one.sha256:
            yield (
                f"{where}: down_proj of the experts of layer {layer} is not what the repair gave: "
                "its SHA-256 is another than the one that was recorded"
            )
    if n_tensors != repair.n_tensors:
        yield (
            f"{where}: the repair is recorded to have given {repair.n_tensors} tensors, expected "
            f"{n_tensors}"
        )


def check_option(manifest: Manifest) -> Iterator[str]:
    """The option that asked for a repair, against what is recorded of one."""
    options, (expected,) = manifest.options, asked_repairs(manifest)
    if options is not None and options.repair != expected:
        yield f"options.repair is {shown(options.repair)}, expected {expected}"


def with_repaired(view: PrunedView, repair: RepairRecord, folder: Checkpoint) -> PrunedView:
    """The pruned source with the repaired weights of a folder, which `check_repaired` checks.

    Raises CheckpointError if they are of another type or shape.
    """
    names: set[str] = set()
    for layer, one in repair.layers.items():
        if one.sha256 and layer in view.kept:
            names |= repaired_names(folder, view.model, layer)
    if missing := names - folder.tensors.keys():
        raise CheckpointError(f"{folder.folder}: no tensor {min(missing)!r}")
    return ReplacedView(view, folder, names)
