"""The files of a build against its plan and the pruned model, before they get their final names."""

from __future__ import annotations

from pathlib import Path

from reap2gguf.checkpoint.weights import Weights
from reap2gguf.models import MoeModel, SideFile
from reap2gguf.progress import Progress
from reap2gguf.pruning.view import PrunedView
from reap2gguf.pruning.write import companion_files
from reap2gguf.quantizing.resolve import ResolvedRecipe
from reap2gguf.verifying.gguf_file import ExpectedGguf, check_gguf, check_side_file
from reap2gguf.verifying.hf_folder import compare_files, compare_folder, open_folder


def verify_pruned(folder: Path, pruned: PrunedView, progress: Progress) -> list[str]:
    """Violations of a folder that must hold the pruned model and its small files."""
    checkpoint, model, violations = open_folder(folder, pruned.n_kept)
    violations += compare_files(folder, companion_files(pruned.folder))
    if checkpoint is not None and model is not None:
        with checkpoint:
            violations += compare_folder(checkpoint, pruned, model, progress)
    return violations


def verify_gguf(
    path: Path,
    recipe: ResolvedRecipe,
    pruned: Weights,
    model: MoeModel,
    n_threads: int,
    progress: Progress,
) -> list[str]:
    """Violations of one GGUF file against the plan and the pruned model."""
    file_type = recipe.llama_file_type.value
    expected = ExpectedGguf(recipe.tensor_types(), model.facts.n_experts, file_type)
    return list(check_gguf(path, expected, (pruned, model), n_threads, progress))


def verify_side(
    path: Path, side: SideFile, pruned: Weights, n_threads: int, progress: Progress
) -> list[str]:
    """Violations of a side file against its description and the pruned model."""
    source = (pruned, [side])
    return list(check_side_file(path, side.tensor_types(), source, n_threads, progress))
