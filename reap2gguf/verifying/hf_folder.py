"""Checks a pruned safetensors folder: config, shards, experts, routers, values."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.checkpoint.weights import NUMPY_TYPES, Weights, to_float32
from reap2gguf.errors import Reap2ggufError
from reap2gguf.models.description import Expert
from reap2gguf.models.table import describe
from reap2gguf.pruning.write import companion_files, config_text
from reap2gguf.verifying.shards import check_config_text, check_shards

if TYPE_CHECKING:
    from reap2gguf.checkpoint.safetensors_header import StoredTensor
    from reap2gguf.models.contract import MoeModel
    from reap2gguf.progress import Progress
    from reap2gguf.pruning.view import PrunedView

_BLOCK_BYTES = 2**20
_MAX_VALUES = 2**22  # that are compared or checked at a time
_FLOATS = ("F32", "F16", "BF16")
_Raw = npt.NDArray[np.uint8]


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


def check_folder(checkpoint: Checkpoint, model: MoeModel, progress: Progress) -> Iterator[str]:
    """Violations in the values of an opened folder, where there is nothing to compare them with.

    A matrix of zeros is none: a source may have one.
    """
    with progress.task("Verifying safetensors", checkpoint.n_bytes, "bytes") as task:
        for name in checkpoint.tensors:
            yield from _check_tensor(checkpoint, model, name, task.advance)


def check_pruned(folder: Path, pruned: PrunedView, progress: Progress) -> list[str]:
    """Violations of a folder that must hold the pruned model and its small files."""
    checkpoint, model, violations = open_folder(folder, pruned.n_kept)
    violations += compare_files(folder, companion_files(pruned.folder))
    if checkpoint is not None and model is not None:
        with checkpoint:
            violations += check_shards(checkpoint)
            if checkpoint.config == pruned.config:  # else that is the violation
                violations += check_config_text(checkpoint)
            violations += compare_folder(checkpoint, pruned, model, progress)
    return violations


def compare_folder(
    checkpoint: Checkpoint, expected: Weights, model: MoeModel, progress: Progress
) -> Iterator[str]:
    """Violations in an opened folder that must be `expected`: config, tensors, and every byte."""
    where = checkpoint.folder.name
    if checkpoint.config != expected.config:
        yield f"{where}: config.json differs from the planned one"
    elif config_text(checkpoint.config) != config_text(expected.config):
        yield f"{where}: config.json has its keys in another order than the planned one"
    for name in sorted(expected.tensors.keys() - checkpoint.tensors.keys()):
        yield f"{where}: tensor {name} is missing"
    for name in sorted(checkpoint.tensors.keys() - expected.tensors.keys()):
        yield f"{where}: tensor {name} is not in the plan"
    with progress.task("Verifying safetensors", checkpoint.n_bytes, "bytes") as task:
        for name, stored in checkpoint.tensors.items():
            plan = expected.tensors.get(name)
            if plan is None:
                yield from _check_tensor(checkpoint, model, name, task.advance)
            elif (stored.dtype, stored.shape) != (plan.dtype, plan.shape):
                yield (
                    f"{where}: {name} is {stored.dtype} {list(stored.shape)}, expected "
                    f"{plan.dtype} {list(plan.shape)}"
                )
            else:
                yield from _compare_bytes(checkpoint, expected, name, task.advance)


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


def _compare_bytes(
    checkpoint: Checkpoint, expected: Weights, name: str, advance: Callable[[float], None]
) -> Iterator[str]:
    """One violation at most: a byte that is not the expected one, NaN, or infinity."""
    stored = checkpoint.tensors[name]
    where = f"{checkpoint.folder.name}: {name}"
    for first, raw in _flat_parts(checkpoint, stored, 0, stored.n_elements):
        wanted = np.empty_like(raw)
        expected.read_bytes(name, first, wanted)
        if not np.array_equal(raw, wanted):
            byte = first + int(np.argmax(raw != wanted))
            entry = byte // (math.prod(stored.shape[1:]) * stored.item_bytes)
            source_name, source_entry = expected.origin(name, entry)
            yield (
                f"{where}: entry {entry} differs from entry {source_entry} of the source's "
                f"{source_name}"
            )
            return
        if not _is_finite(stored, raw).all():
            yield f"{where} holds NaN or infinite values"
            return
        advance(raw.nbytes)


def _check_tensor(
    checkpoint: Checkpoint, model: MoeModel, name: str, advance: Callable[[float], None]
) -> Iterator[str]:
    """One violation at most: NaN or infinity, with the expert that holds it."""
    stored = checkpoint.tensors[name]
    role = model.role(name)
    is_fused = isinstance(role, Expert) and role.expert is None
    for first, raw in _flat_parts(checkpoint, stored, 0, stored.n_elements):
        finite = _is_finite(stored, raw)
        if not finite.all():
            value = first // stored.item_bytes + int(np.argmin(finite))
            expert = value * stored.shape[0] // stored.n_elements if is_fused else None
            which = "" if expert is None else f" for expert {expert}"
            yield f"{checkpoint.folder.name}: {name} holds NaN or infinite values{which}"
            return
        advance(raw.nbytes)


def _flat_parts(
    checkpoint: Checkpoint, stored: StoredTensor, first_value: int, n_values: int
) -> Iterator[tuple[int, _Raw]]:
    """The bytes of some values of a tensor, at most a few million at a time, and where they begin.

    The parts are 1D and begin at a whole value.
    """
    begin, end = first_value * stored.item_bytes, (first_value + n_values) * stored.item_bytes
    step = _MAX_VALUES * stored.item_bytes
    for first in range(begin, end, step):
        raw = np.empty(min(step, end - first), dtype=np.uint8)
        checkpoint.read_bytes(stored.name, first, raw)
        yield first, raw


def _is_finite(stored: StoredTensor, raw: _Raw) -> npt.NDArray[np.bool_]:
    """Which values are finite; all that are no floats."""
    bits = raw.view(NUMPY_TYPES[stored.dtype])
    if stored.dtype not in _FLOATS:
        return np.ones(bits.shape, dtype=bool)
    return np.isfinite(to_float32(bits, stored.dtype, stored.name))
