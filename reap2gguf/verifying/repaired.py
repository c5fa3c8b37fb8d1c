"""Verifies the weights that a repair gave: by the hashes of the record that came with them.

They cannot be computed again from the source alone: that takes the text of the calibration, the
same kind of machine, and as long as the build took. All other weights are compared with the source.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from reap2gguf.bundle.manifest import repair_record
from reap2gguf.checkpoint.config import read_json
from reap2gguf.errors import ArtifactError, CheckpointError
from reap2gguf.messages import shown
from reap2gguf.pruning.write import KEPT_FILE
from reap2gguf.repairing.limits import repaired_layers
from reap2gguf.repairing.record import tensors_sha256

if TYPE_CHECKING:
    from reap2gguf.bundle.manifest import Manifest
    from reap2gguf.bundle.records import RepairRecord
    from reap2gguf.checkpoint.checkpoint import Checkpoint
    from reap2gguf.models.contract import MoeModel

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
    repair, options = manifest.pruning.repair, manifest.options
    expected = "none" if repair is None else repair.kind
    if options is not None and options.repair != expected:
        yield f"options.repair is {shown(options.repair)}, expected {expected}"


def repaired_in(repair: RepairRecord, checkpoint: Checkpoint, model: MoeModel) -> set[str]:
    """All tensors of a folder that a repair has replaced, as far as they are there."""
    found: set[str] = set()
    for layer, one in repair.layers.items():
        if one.sha256 and layer in model.facts.moe_layers:
            found |= repaired_names(checkpoint, model, layer)
    return found & checkpoint.tensors.keys()


def read_repair(folder: Path) -> RepairRecord | None:
    """The repair in `kept_experts.json`; None without one. Raises ArtifactError."""
    path = folder / KEPT_FILE
    try:
        values = read_json(path).get("repair")
        return None if values is None else repair_record(values)
    except (CheckpointError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(f"{path}: repair is not a complete record ({shown(error)})") from error
