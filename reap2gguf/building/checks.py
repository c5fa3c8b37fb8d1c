"""What a build checks before it gives anything its final name: files against plan and source."""

from __future__ import annotations

from pathlib import Path

from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.models import MoeModel, SideFile
from reap2gguf.progress import Progress
from reap2gguf.pruning.select import Kept
from reap2gguf.pruning.write import plan_pruned
from reap2gguf.quantizing.resolve import ResolvedRecipe
from reap2gguf.verifying.gguf_file import (
    ExpectedGguf,
    check_against_folder,
    check_header,
    check_tensor_types,
    check_tensors,
    open_gguf,
)
from reap2gguf.verifying.hf_folder import ExpectedFolder, ExpectedTensor, check_folder


def expected_folder(model: MoeModel, source: Checkpoint, kept: Kept, n_kept: int) -> ExpectedFolder:
    """What the pruned safetensors must be, tensor by tensor."""
    return ExpectedFolder(
        n_kept,
        [
            ExpectedTensor(
                tensor.planned.name,
                tensor.planned.dtype,
                tensor.planned.shape,
                tensor.source.name,
                tensor.entries,
            )
            for tensor in plan_pruned(model, source.tensors, kept)
        ],
    )


def verify_pruned(
    pruned: Checkpoint,
    model: MoeModel,
    expected: ExpectedFolder,
    source: Checkpoint,
    progress: Progress,
) -> list[str]:
    """Violations of the pruned safetensors against plan and source."""
    return list(check_folder(pruned, model, expected, source, progress))


def verify_gguf(
    path: Path,
    recipe: ResolvedRecipe,
    pruned: Checkpoint,
    model: MoeModel,
    n_threads: int,
    progress: Progress,
) -> list[str]:
    """Violations of one GGUF file against plan and pruned safetensors."""
    header, violations = open_gguf(path)
    if header is not None:
        file_type = recipe.recipe.mixture.file_type.value
        expected = ExpectedGguf(recipe.tensor_types(), model.facts.n_experts, file_type)
        violations += check_header(header, expected)
        violations += check_against_folder(header, pruned, model, n_threads, progress)
    return violations


def verify_side(
    path: Path, side: SideFile, pruned: Checkpoint, n_threads: int, progress: Progress
) -> list[str]:
    """Violations of a side file against its description and the pruned safetensors."""
    header, violations = open_gguf(path)
    if header is not None:
        violations += check_tensor_types(header, side.tensor_types())
        violations += check_tensors(header, pruned, side.tensors, n_threads, progress)
    return violations
