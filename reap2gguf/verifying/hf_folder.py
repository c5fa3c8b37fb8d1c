"""Checks a pruned safetensors folder: config, shards, experts, routers, values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.checkpoint.safetensors_header import StoredTensor
from reap2gguf.checkpoint.values import NUMPY_TYPES, to_float32
from reap2gguf.errors import Reap2ggufError
from reap2gguf.models import Expert, MoeModel, describe
from reap2gguf.progress import Progress

_PIECE_VALUES = 2**22
_FLOATS = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class ExpectedTensor:
    """A tensor of the pruned folder, and the source entries that its bytes must equal."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    source: str | None = None
    entries: Sequence[int] | None = None  # along axis 0 of the source; None: all of it


@dataclass(frozen=True)
class ExpectedFolder:
    """What a pruned folder must hold."""

    n_experts: int
    tensors: Sequence[ExpectedTensor] | None = None  # None: whatever its own config implies


def open_folder(
    folder: Path, expected: ExpectedFolder | None
) -> tuple[Checkpoint | None, MoeModel | None, list[str]]:
    """Open a folder whose config, shards and expert counts agree; else the violations."""
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
    if expected is not None and model.facts.n_experts != expected.n_experts:
        found = model.facts.n_experts
        message = f"config.json says {found} experts, expected {expected.n_experts}"
        return checkpoint, None, [f"{folder.name}: {message}"]
    return checkpoint, model, []


def check_folder(
    checkpoint: Checkpoint,
    model: MoeModel,
    expected: ExpectedFolder,
    source: Checkpoint | None,
    progress: Progress,
) -> Iterator[str]:
    """Violations in an opened folder: names, shapes, dtypes, then every value."""
    where = checkpoint.folder.name
    wanted = {tensor.name: tensor for tensor in expected.tensors or ()}
    if wanted:
        for name in sorted(wanted.keys() - checkpoint.tensors.keys()):
            yield f"{where}: tensor {name} is missing"
        for name in sorted(checkpoint.tensors.keys() - wanted.keys()):
            yield f"{where}: tensor {name} is not in the plan"
    with progress.task("Verifying safetensors", checkpoint.n_bytes, "bytes") as task:
        for name, stored in checkpoint.tensors.items():
            plan = wanted.get(name)
            if plan is not None and (stored.dtype, stored.shape) != (plan.dtype, plan.shape):
                yield (
                    f"{where}: {name} is {stored.dtype} {list(stored.shape)}, expected "
                    f"{plan.dtype} {list(plan.shape)}"
                )
            elif plan is not None and source is not None:
                yield from _compare_bytes(checkpoint, plan, source, task.advance)
            else:
                yield from _check_values(checkpoint, model, name, task.advance)


def _compare_bytes(
    checkpoint: Checkpoint,
    plan: ExpectedTensor,
    source: Checkpoint,
    advance: Callable[[float], None],
) -> Iterator[str]:
    """Every byte against the source's, at the entries that were kept."""
    name, source_name = plan.name, plan.source or plan.name
    length = plan.shape[0] if plan.shape else 1
    step = max(1, _PIECE_VALUES // max(1, int(np.prod(plan.shape[1:]))))
    if plan.entries is not None:
        step = 1
    for first in range(0, length, step):
        last = min(first + step, length)
        begin = first if plan.entries is None else plan.entries[first]
        written = checkpoint.read(name, first, last)
        if written.tobytes() != source.read(source_name, begin, begin + last - first).tobytes():
            yield (
                f"{checkpoint.folder.name}: {name}: entry {first} differs from entry {begin} of "
                f"the source's {source_name}"
            )
            return
        if not _is_finite(checkpoint, name, written):
            yield f"{checkpoint.folder.name}: {name} holds NaN or infinite values"
            return
        advance(written.nbytes)


def _check_values(
    checkpoint: Checkpoint, model: MoeModel, name: str, advance: Callable[[float], None]
) -> Iterator[str]:
    """One violation at most: NaN or infinity, or a matrix (each expert's own) of zeros alone."""
    stored = checkpoint.tensors[name]
    role = model.role(name)
    is_fused = isinstance(role, Expert) and role.expert is None
    n_parts = stored.shape[0] if is_fused else 1
    for part in range(n_parts):
        is_empty = stored.dtype in _FLOATS
        for piece in _flat_pieces(checkpoint, stored, part, n_parts):
            if not _is_finite(checkpoint, name, piece):
                yield f"{checkpoint.folder.name}: {name} holds NaN or infinite values"
                return
            is_empty = is_empty and not piece.any()
            advance(piece.nbytes)
        # a vector may be zero: biases often are, and norms stored around zero
        if is_empty and len(stored.shape) > 1:
            which = f" for expert {part}" if is_fused else ""
            yield f"{checkpoint.folder.name}: {name} holds nothing but zeros{which}"
            return


def _flat_pieces(
    checkpoint: Checkpoint, stored: StoredTensor, part: int, n_parts: int
) -> Iterator[npt.NDArray[np.generic]]:
    """The values of one of `n_parts` equal parts of a tensor, a few million at a time."""
    size = stored.n_elements // n_parts
    for first in range(part * size, (part + 1) * size, _PIECE_VALUES):
        n_values = min(_PIECE_VALUES, (part + 1) * size - first)
        raw = np.empty(n_values * stored.item_bytes, dtype=np.uint8)
        checkpoint.read_bytes(stored.name, first * stored.item_bytes, raw)
        yield raw.view(NUMPY_TYPES[stored.dtype])


def _is_finite(checkpoint: Checkpoint, name: str, raw: npt.NDArray[np.generic]) -> bool:
    dtype = checkpoint.tensors[name].dtype
    return dtype not in _FLOATS or bool(np.isfinite(to_float32(raw, dtype, name)).all())
