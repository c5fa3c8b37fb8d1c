"""What each type loses of each tensor, measured on sampled rows.

Rows are quantized with the importance of their columns, as an export does it, and dequantized. The
error is that of the products of matrix and input, if the inputs of different columns do not depend
on each other: the squared differences, times the mean square of what multiplies the column, over
the squared values with the same factor. An expert counts as often as it was used.

A GPU quantizes what it has kernels for, and the same bytes as the processor: the table is the same.

Memory: each thread holds the sampled rows of a tensor, at most 2^18 values as float32, four times,
and their blocks of all types; of a tensor that is stored in another order than GGUF's, one matrix
as well. The table has a number for each tensor and type.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as Type

from reap2gguf.atomic import write_whole
from reap2gguf.errors import CheckpointError
from reap2gguf.exporting.device_blocks import making
from reap2gguf.exporting.row_ranges import RowRange, batched
from reap2gguf.files import plain_size
from reap2gguf.ggml import NEEDS_IMPORTANCE, is_tiny
from reap2gguf.gguf_files.rows import rows_per_matrix, stored_bytes
from reap2gguf.gguf_files.tensor_types import block_of, row_bytes

if TYPE_CHECKING:
    from reap2gguf.exporting.device_blocks import Making
    from reap2gguf.exporting.row_ranges import Batch, BlockMaker
    from reap2gguf.ggml import Floats
    from reap2gguf.gguf_files.imatrix import ImatrixEntry
    from reap2gguf.models.description import GgufTensor
    from reap2gguf.progress import Progress

# What is measured, from most bits to fewest. A type of less than 2 bits is slow to prepare.
_NAMES = (
    "BF16 Q8_0 Q6_K Q5_1 Q5_K Q5_0 Q4_1 Q4_K Q4_0 IQ4_NL IQ4_XS Q3_K IQ3_S IQ3_XXS Q2_K IQ2_S "
    "IQ2_XS IQ2_XXS"
)
TYPES = tuple(Type[name] for name in _NAMES.split())
SMALLEST_TYPES = (Type.IQ1_M, Type.IQ1_S)
SAMPLED = 2**18  # values of a tensor
_MAX_RUNS = 16  # that they are read in, spread over the tensor
_MAX_CACHE_BYTES = 2**26
_SECONDS_KEPT = 10.0  # after which what was measured is kept again
FORMAT = 1

Errors = Mapping[str, Mapping[str, float]]  # tensor -> type -> relative squared error
Blocks = npt.NDArray[np.uint8]  # (rows, bytes of a row)


@dataclass(frozen=True)
class Where:
    """What measures: auto, cpu or cuda, and how many threads."""

    device: str
    n_threads: int


def types_for(tensor: GgufTensor, is_weighted: bool, types: Sequence[Type]) -> list[Type]:
    """Those of some types that a tensor can have.

    A tensor that is stored in blocks of a file's type can stay so, and no larger type holds more.
    """
    found = [
        one
        for one in types
        if tensor.n_columns % block_of(one)[0] == 0 and (is_weighted or one not in NEEDS_IMPORTANCE)
    ]
    if (kept := tensor.block_type) is None:
        return found
    most = row_bytes(kept, tensor.n_columns)
    return [*(one for one in found if row_bytes(one, tensor.n_columns) < most), kept]


def sampled_rows(tensor: GgufTensor) -> Iterator[RowRange]:
    """Runs of rows, spread evenly over a tensor's matrices and rows: all rows of a small one."""
    n_rows, n_matrices = rows_per_matrix(tensor), len(tensor.slabs)
    n_runs = min(_MAX_RUNS, n_matrices * n_rows)
    per_run = max(1, min(SAMPLED, math.prod(tensor.shape)) // (n_runs * tensor.n_columns))
    done = 0
    for run in range(n_runs):
        matrix, row = divmod(run * n_matrices * n_rows // n_runs, n_rows)
        first = max(done, matrix * n_rows + row)
        last = min(first + per_run, (matrix + 1) * n_rows)  # of one matrix
        if first < last:
            start = matrix * n_rows
            yield RowRange(tensor, matrix, tensor.slabs[matrix], first - start, last - start)
            done = last


def measure(
    host: BlockMaker,
    tensors: Sequence[GgufTensor],
    types: Sequence[Type],
    where: Where,
    progress: Progress,
    known: Errors,
    keep: Callable[[Errors], None] = lambda errors: None,
) -> dict[str, dict[str, float]]:
    """The errors of all tensors in the types that they can have, and all of `known`.

    A type that cannot hold a tensor's values has no entry in a tensor's errors but infinity. `keep`
    is given what is there, now and then, to be found again after a kill. Raises CheckpointError for
    values that are not finite.
    """
    found = {name: dict(by_type) for name, by_type in known.items()}
    todo: list[tuple[GgufTensor, list[Type]]] = []
    for tensor in tensors:
        can = types_for(tensor, tensor.name in host.importance, types)
        there = found.setdefault(tensor.name, {})
        if missing := [one for one in can if one.name not in there]:
            todo.append((tensor, missing))
    if not todo:
        return found
    keys = {(one, tensor.name in host.importance) for tensor, some in todo for one in some}
    n_values = sum(min(SAMPLED, math.prod(tensor.shape)) * len(some) for tensor, some in todo)
    with (
        progress.task("Measuring types", len(todo), "tensors") as task,
        making(host, where.device, keys, n_values, where.n_threads, progress) as made,
        ThreadPoolExecutor(made.n_threads) as pool,
    ):
        jobs = {pool.submit(_measure_one, host, made, *one): one[0].name for one in todo}
        kept = time.monotonic()
        try:
            for job in as_completed(jobs):
                found[jobs[job]].update(job.result())
                task.advance()
                if time.monotonic() - kept > _SECONDS_KEPT:
                    keep(found)
                    kept = time.monotonic()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return found


def _measure_one(
    host: BlockMaker, made: Making, tensor: GgufTensor, types: Sequence[Type]
) -> dict[str, float]:
    """The relative errors of one tensor."""
    lost, whole = dict.fromkeys((one.name for one in types), 0.0), 0.0
    entry, reader = host.importance.get(tensor.name), _Reader(host)
    for batch in batched(host.weights, sampled_rows(tensor), made.batch_bytes):
        values = [reader.read(rows) for rows in batch]
        weights = [_weights(entry, rows) for rows in batch]
        whole += sum(map(_energy, values, weights))
        for one, blocks in _blocks(host, made, batch, types, values).items():
            for raw, true, factors in zip(blocks, values, weights, strict=True):
                away = math.inf
                if raw is not None:
                    away = _energy(host.quantizer.dequantize(raw, one) - true, factors)
                lost[one.name] += away
    return {name: amount / whole if whole else 0.0 for name, amount in lost.items()}


class _Reader:
    """Reads runs of rows of a tensor; a matrix that has to be read whole is read once for all."""

    def __init__(self, host: BlockMaker) -> None:
        self._host = host
        self._matrix: int | None = None
        self._values: Floats

    def read(self, rows: RowRange) -> Floats:
        """The values of a run; runs come in the order of their matrices."""
        if _is_stored(self._host, rows):
            return self._host.read(rows)
        if self._matrix != rows.matrix:
            self._matrix = rows.matrix
            self._values = self._host.read(
                replace(rows, first=0, last=rows_per_matrix(rows.tensor))
            )
        return self._values[rows.first : rows.last]


def _is_stored(host: BlockMaker, rows: RowRange) -> bool:
    """Whether a run is stored side by side as GGUF is to hold it."""
    place = stored_bytes(host.weights, rows.tensor, rows.slab, rows.first, rows.last)
    return place is not None


def _blocks(
    host: BlockMaker, made: Making, batch: Batch, types: Sequence[Type], values: Sequence[Floats]
) -> dict[Type, list[Blocks | None]]:
    """Each range of a batch in each type; None for a type that cannot hold its values."""
    if made.maker is not host and _is_stored(host, batch[0]):
        try:
            found = made.maker.make(batch, types)
        except CheckpointError:
            pass  # some type cannot: the processor says which
        else:
            ends = np.cumsum([rows.last - rows.first for rows in batch])[:-1]
            return {one: [*np.split(data, ends)] for one, data in found.items()}
    return {
        one: [_quantized(host, *part, one) for part in zip(batch, values, strict=True)]
        for one in types
    }


def _quantized(
    host: BlockMaker, rows: RowRange, values: Floats, tensor_type: Type
) -> Blocks | None:
    """A range of rows in a type; None if the type cannot hold them."""
    try:
        raw = host.quantize(rows, values, tensor_type)
        if is_tiny(float(np.abs(values).max()), tensor_type):
            host.check_precision(rows, values, tensor_type, raw)
    except CheckpointError:
        return None
    return raw


def _energy(values: Floats, weights: Floats) -> float:
    """The squares of values (R, C), times the weight of their column, added up."""
    return float(np.square(values, dtype=np.float64).sum(axis=0) @ weights)


def _weights(entry: ImatrixEntry | None, rows: RowRange) -> Floats:
    """What an error in each column (C,) weighs: the mean square of its input, for each token."""
    n_columns = rows.tensor.n_columns
    if entry is None:
        return np.ones(n_columns, np.float32)
    row = rows.matrix * n_columns // entry.sums.shape[1]
    share = max(int(entry.counts[row]), 1) / max(int(entry.counts.sum()), 1)
    return entry.importance_of(rows.matrix, n_columns) * np.float32(share)


@dataclass(frozen=True)
class Cache:
    """A file that keeps the errors that were measured, and what they are of."""

    path: Path
    key: str

    def load(self, note: Callable[[str], None]) -> Errors:
        """What it holds; nothing, with a note, if it is of something else or cannot be read."""
        if not self.path.exists():
            return {}
        try:
            if plain_size(self.path) > _MAX_CACHE_BYTES:
                raise ValueError(f"over {_MAX_CACHE_BYTES:,} bytes")
            values = json.loads(self.path.read_text(encoding="utf-8"))
            if values["key"] != self.key:
                note(f"{self.path}: of another model, imatrix or libggml; measuring again")
                return {}
            errors = {
                str(name): {str(one): float(error) for one, error in by_type.items()}
                for name, by_type in values["errors"].items()
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            note(f"{self.path}: cannot be read ({type(error).__name__}); measuring again")
            return {}
        if any(not error >= 0 for by_type in errors.values() for error in by_type.values()):
            note(f"{self.path}: holds errors that are not positive numbers; measuring again")
            return {}
        return errors

    def save(self, errors: Errors) -> None:
        """Write it, whole or not at all. Raises OutputError if the disk refuses."""
        text = json.dumps({"key": self.key, "errors": errors}, indent=1, sort_keys=True)
        write_whole(self.path, f"{text}\n")
