"""Verifies GGUF files that were pruned by slicing, against the GGUF file that they were made from.

Which experts a file keeps stands in its own header. From that and the source, every byte that the
file must have is known: its header is compared as a whole, and its blocks expert by expert.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from gguf import Keys

from reap2gguf.errors import ArtifactError, CheckpointError, Reap2ggufError, UsageError
from reap2gguf.exporting.header_facts import COUNT_KEY, SOURCE_KEY, pruning_values
from reap2gguf.gguf_files.part_names import parse_part_name
from reap2gguf.gguf_files.split import read_whole_header
from reap2gguf.gguf_source.checking import violations_in
from reap2gguf.gguf_source.header import RECIPE_KEY
from reap2gguf.gguf_source.writing import PrunedGguf, planned
from reap2gguf.messages import shown
from reap2gguf.pruning.given_kept import check_kept_map
from reap2gguf.pruning.history import read_history
from reap2gguf.pruning.view import PrunedView

if TYPE_CHECKING:
    from collections.abc import Iterator

    from reap2gguf.checkpoint.weights import Weights
    from reap2gguf.gguf_files.reader import GgufHeader
    from reap2gguf.gguf_source.checkpoint import GgufCheckpoint
    from reap2gguf.models.contract import MoeModel
    from reap2gguf.progress import Progress
    from reap2gguf.pruning.select import Kept

KEPT_KEY = "reap2gguf.kept_experts"
_TEXTS = ("reap2gguf.source", "reap2gguf.method", "reap2gguf.version", Keys.General.NAME)


def is_sliced_of(reference: tuple[Weights, object] | None, header: GgufHeader | None) -> bool:
    """Whether a file says that it was sliced, and the GGUF file that it was sliced from is there.

    One with another recipe than that file was quantized again. One with the same may have been,
    too: the manifest of a bundle tells.
    """
    source = None if reference is None else reference[0].gguf
    if source is None or header is None or KEPT_KEY not in header.metadata:
        return False
    return header.metadata.get(RECIPE_KEY) == source.metadata.get(RECIPE_KEY)


def compared_blocks(path: Path, weights: Weights, progress: Progress) -> Iterator[str]:
    """Violations in a sliced file against its source, of which `weights` are a view."""
    source = weights.source if isinstance(weights, PrunedView) else weights
    try:
        plan = expected_slices(path, cast("GgufCheckpoint", source), progress)
    except Reap2ggufError as error:
        yield str(error)
        return
    files = [(file.path, file.source, file.start) for file in plan.files]
    yield from violations_in(plan.slices, files, progress)


def expected_slices(path: Path, checkpoint: GgufCheckpoint, progress: Progress) -> PrunedGguf:
    """What a file must hold that says which experts of `checkpoint` it keeps.

    Raises ArtifactError if it does not say so, or if they are not experts of that model.
    """
    header = read_whole_header(path)
    source, method, version, name = (_text(header, key) for key in _TEXTS)
    model, kept = kept_in(header, checkpoint)
    view = PrunedView(checkpoint, model, kept)
    history = read_history(checkpoint, model.facts, progress.note)
    earlier = None if history is None else history.after(kept)
    own = pruning_values(source, method, model.facts.n_experts, kept, version, earlier)
    part = parse_part_name(path.name)
    output = path if part is None else path.with_name(f"{part.stem}.gguf")
    plan = planned(checkpoint, view, output, name, own)
    if len(plan.files) != len(header.headers):
        raise ArtifactError(
            f"{path}: has {len(header.headers)} parts, and {checkpoint.gguf.path} has "
            f"{len(plan.files)}; compare it as it was written"
        )
    return plan


def kept_in(header: GgufHeader, checkpoint: GgufCheckpoint) -> tuple[MoeModel, Kept]:
    """Which experts a file keeps; the model is without its MTP block if that was dropped."""
    path, flat = header.path, header.metadata.get(KEPT_KEY)
    count: Any = header.metadata.get(f"{checkpoint.decoded.model.facts.gguf_arch}.expert_count")
    count = count[0] if isinstance(count, list) and count else count
    if not isinstance(flat, list) or type(count) is not int or count < 1:
        raise ArtifactError(
            f"{path}: does not say which experts it keeps ({KEPT_KEY}), so it was not pruned "
            "from a GGUF file by this program; leave out --source"
        )
    models = [checkpoint.decoded.model]
    before, n_experts = header.metadata.get(COUNT_KEY), models[0].facts.n_experts
    if before is not None and before != n_experts:
        raise ArtifactError(
            f"{path}: was made from {shown(header.metadata.get(SOURCE_KEY))}, of {shown(before)} "
            f"experts per layer, and {checkpoint.gguf.path} has {n_experts}; pass the file that it "
            "was made from as --source"
        )
    if models[0].facts.has_mtp:
        models.append(type(models[0]).of(checkpoint, keep_mtp=False))
    for model in models:
        layers = model.facts.moe_layers
        if len(flat) == count * len(layers):
            by_layer = {
                layer: flat[at * count : (at + 1) * count] for at, layer in enumerate(layers)
            }
            try:
                return model, check_kept_map(by_layer, model.facts, str(path))
            except (CheckpointError, UsageError) as error:
                raise ArtifactError(f"{path}: {error}") from error
    raise ArtifactError(
        f"{path}: names {len(flat):,} kept experts, expected {count} in each of "
        f"{len(models[0].facts.moe_layers)} layers of {checkpoint.gguf.path}"
    )


def _text(header: GgufHeader, key: str) -> str:
    value = header.metadata.get(key)
    if not isinstance(value, str):
        raise ArtifactError(f"{header.path}: {key} is {shown(value)}, expected a text")
    return value
