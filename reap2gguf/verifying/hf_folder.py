"""Checks a pruned safetensors folder: config, shards, experts, routers, values."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.errors import Reap2ggufError
from reap2gguf.models.table import describe
from reap2gguf.pruning.write import companion_files, config_text
from reap2gguf.verifying.folder_values import Values
from reap2gguf.verifying.shards import check_config_text, check_shards

if TYPE_CHECKING:
    from reap2gguf.checkpoint.safetensors_header import StoredTensor
    from reap2gguf.checkpoint.weights import Weights
    from reap2gguf.models.contract import MoeModel
    from reap2gguf.progress import Progress
    from reap2gguf.pruning.view import PrunedView

_BLOCK_BYTES = 2**20


def open_folder(
    folder: Path, n_experts: int | None = None
) -> tuple[Checkpoint | None, MoeModel | None, list[str]]:
    """Open a folder whose config, shards and expert counts agree; else the violations.

    `n_experts` is the number of experts per layer that it must have, if that is known.
    """
    try:
        checkpoint = Checkpoint.open(folder)
    except Reap2ggufError as error:
        return None, None, [str(error)]
    try:
        model = describe(checkpoint)
    except Reap2ggufError as error:
        return checkpoint, None, [f"{folder.name}: {error}"]
    if problem := model.config_at_odds():
        return checkpoint, model, [f"{folder.name}: {problem}"]
    if n_experts is not None and model.facts.n_experts != n_experts:
        message = f"config.json says {model.facts.n_experts} experts, expected {n_experts}"
        return checkpoint, None, [f"{folder.name}: {message}"]
    return checkpoint, model, []


def check_folder(
    checkpoint: Checkpoint, model: MoeModel, progress: Progress, n_threads: int = 1
) -> Iterator[str]:
    """Violations in the values of an opened folder, where there is nothing to compare them with.

    A matrix of zeros is none: a source may have one.
    """
    with progress.task("Verifying safetensors", checkpoint.n_bytes, "bytes") as task:
        values = Values(checkpoint, model)
        yield from values.check(checkpoint.stored.tensors.values(), n_threads, task.advance)


def check_pruned(
    folder: Path, pruned: PrunedView, progress: Progress, n_threads: int = 1
) -> list[str]:
    """Violations of a folder that must hold the pruned model and its small files."""
    checkpoint, model, violations = open_folder(folder, pruned.n_kept)
    violations += compare_files(folder, companion_files(pruned.folder))
    if checkpoint is not None and model is not None:
        with checkpoint:
            violations += check_shards(checkpoint)
            if checkpoint.stored.config == pruned.stored.config:  # else that is the violation
                violations += check_config_text(checkpoint)
            violations += compare_folder(checkpoint, pruned, model, progress, n_threads)
    return violations


def compare_folder(
    checkpoint: Checkpoint,
    expected: Weights,
    model: MoeModel,
    progress: Progress,
    n_threads: int = 1,
) -> Iterator[str]:
    """Violations in an opened folder that must be `expected`: config, tensors, and every byte."""
    where, found, planned = checkpoint.folder.name, checkpoint.stored, expected.stored
    if found.config != planned.config:
        yield f"{where}: config.json differs from the planned one"
    elif config_text(found.config) != config_text(planned.config):
        yield f"{where}: config.json has its keys in another order than the planned one"
    for name in sorted(planned.tensors.keys() - found.tensors.keys()):
        yield f"{where}: tensor {name} is missing"
    for name in sorted(found.tensors.keys() - planned.tensors.keys()):
        yield f"{where}: tensor {name} is not in the plan"
    same: list[StoredTensor] = []
    for name, stored in found.tensors.items():
        plan = planned.tensors.get(name)
        if plan is None or (stored.dtype, stored.shape) == (plan.dtype, plan.shape):
            same.append(stored)
        else:
            yield (
                f"{where}: {name} is {stored.dtype} {list(stored.shape)}, expected "
                f"{plan.dtype} {list(plan.shape)}"
            )
    with progress.task("Verifying safetensors", checkpoint.n_bytes, "bytes") as task:
        yield from Values(checkpoint, model, expected).check(same, n_threads, task.advance)


def compare_files(folder: Path, originals: Iterable[Path]) -> Iterator[str]:
    """Violations in small files that must be copies, such as the tokenizer's."""
    for file in originals:
        copy = folder / file.name
        if not copy.is_file():
            yield f"{folder.name}: {file.name} is missing"
        elif not _same_bytes(file, copy):
            yield f"{folder.name}: {file.name} is not a copy of {file}"


def _same_bytes(one: Path, other: Path) -> bool:
    """Whether two small files are equal; filecmp would believe an unchanged size and time."""
    if one.stat().st_size != other.stat().st_size:
        return False
    with one.open("rb") as first, other.open("rb") as second:
        while block := first.read(_BLOCK_BYTES):
            if block != second.read(_BLOCK_BYTES):
                return False
    return True
