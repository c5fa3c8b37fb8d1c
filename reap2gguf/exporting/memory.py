"""The memory of an export, from headers alone: upper bounds, for `plan` and for stages."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil, prod
from typing import TYPE_CHECKING

from reap2gguf.exporting.device_blocks import BATCH_BYTES, device_threads, pays_on_gpu
from reap2gguf.gguf_files.rows import row_ranges, rows_per_matrix, stored_bytes
from reap2gguf.gguf_files.tensor_types import row_bytes
from reap2gguf.quantizing.kernels.codebooks import entries_shape
from reap2gguf.quantizing.kernels.gpu_kernels import FORMS

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

    from reap2gguf.checkpoint.weights import Weights
    from reap2gguf.models.description import GgufTensor
    from reap2gguf.pruning.view import PrunedView
    from reap2gguf.quantizing.resolve import ResolvedRecipe

_HASHED_BYTES = 2**22  # of each file, read back
_VALUE_BYTES = 4 + 4 + 1  # of a weight: as stored, widened, and whether it is finite
_NUMBER = 4  # bytes of a float32 or an int32
# For local variables of kernels, the driver keeps up to 3 KiB of each thread that can run on a GPU
# at the same time: 2,048 on each of the 132 multiprocessors of an H100.
_LOCAL_BYTES = 3 * 2**10 * 2048 * 132
_CODEBOOK_BYTES = 2**20  # of a type IQ2 or IQ3; the largest has 0.7 MiB


@dataclass(frozen=True)
class ExportMemory:
    """Bytes that an export holds at most."""

    pinned: int  # of the host's memory, for the GPU
    host: int  # of the host's other memory
    device: int  # of the GPU

    @property
    def ram(self) -> int:
        """All of the host."""
        return self.pinned + self.host


def export_memory(
    view: PrunedView,
    recipes: Sequence[ResolvedRecipe],
    device: str,
    threads: int,
    has_gpu: bool,
) -> ExportMemory:
    """The most that the export of a model to these recipes holds.

    `device` is auto, cpu or cuda. Where a GPU quantizes, this is the larger of both ways, since a
    GPU that does not work leaves everything to the processor.
    """
    tensors = view.model.gguf_tensors(view.tensors)
    types = [recipe.tensor_types() for recipe in recipes]
    on_cpu = ExportMemory(0, export_bytes(tensors, types, threads), 0)
    if not has_gpu or not export_pays_on_gpu(recipes, device):
        return on_cpu
    on_gpu = device_memory(view, tensors, types, threads)
    return replace(on_gpu, host=max(on_gpu.host, on_cpu.ram - on_gpu.pinned))


def export_pays_on_gpu(recipes: Iterable[ResolvedRecipe], device: str) -> bool:
    """Whether a GPU, where there is one, quantizes to these recipes; `device` as above."""
    shapes = (entry.tensor.shape for recipe in recipes for entry in recipe.table)
    return pays_on_gpu(device, sum(map(prod, shapes)))


def export_bytes(
    tensors: Sequence[GgufTensor],
    types: Sequence[Mapping[str, GGMLQuantizationType]],
    n_threads: int,
) -> int:
    """The most that an export on a CPU holds: a range as stored and widened, and its blocks.

    `types` are those of each file. 4 MiB more for each are read back to hash it.
    """
    most = 0
    for tensor in tensors:
        _, n_rows = max(row_ranges(tensor), key=lambda rows: rows[1] - rows[0])
        blocks = sum(row_bytes(one, tensor.n_columns) for one in {of[tensor.name] for of in types})
        most = max(most, n_rows * (_VALUE_BYTES * tensor.n_columns + blocks))
    return n_threads * most + _HASHED_BYTES * len(types)


def device_memory(
    weights: Weights,
    tensors: Sequence[GgufTensor],
    types: Sequence[Mapping[str, GGMLQuantizationType]],
    n_threads: int,
) -> ExportMemory:
    """The most that an export of these tensors holds where a GPU quantizes.

    `types` are those of each file, `n_threads` the threads that the command has. Ranges of values
    so small that a type may lose them are left out: the host checks them, 16 MiB more per thread.
    """
    batches = [_Batch.of(weights, one, {of[one.name] for of in types}) for one in tensors]
    stored = max((one.stored for one in batches), default=0)
    beside = max((one.beside for one in batches), default=0)
    of_types = _most_by_type(batches)
    largest = max(of_types.values(), default=0)
    threads = device_threads(n_threads)
    return ExportMemory(
        pinned=threads * (stored + beside + sum(of_types.values())),
        host=threads * max((one.host for one in batches), default=0) + _HASHED_BYTES * len(types),
        device=threads * (stored + beside + largest) + _kept_on_gpu(of_types),
    )


def _kept_on_gpu(types: Collection[GGMLQuantizationType]) -> int:
    """What all threads share on a GPU that makes these types."""
    n_codebooks = sum(entries_shape(one) is not None for one in types)
    return n_codebooks * _CODEBOOK_BYTES + (_LOCAL_BYTES if types else 0)


@dataclass(frozen=True)
class _Batch:
    """The largest batch of a tensor, and what a thread holds while it works on it."""

    stored: int  # as it is sent
    beside: int  # importance, the matrix of each row, and what is found of each row
    blocks: Mapping[GGMLQuantizationType, int]  # of types that the GPU makes
    host: int  # bytes of ranges and blocks that the host makes

    @classmethod
    def of(
        cls, weights: Weights, tensor: GgufTensor, types: Collection[GGMLQuantizationType]
    ) -> _Batch:
        columns, per_matrix = tensor.n_columns, rows_per_matrix(tensor)
        first, last = max(row_ranges(tensor), key=lambda rows: rows[1] - rows[0])
        as_stored = stored_bytes(weights, tensor, tensor.slabs[0], first, last)
        value = _NUMBER if as_stored is None else as_stored.count // ((last - first) * columns)
        together = max(1, BATCH_BYTES // (value * columns))
        n_rows = last - first  # of a batch: several ranges, as far as they are stored as they are
        if as_stored is not None:
            n_rows = max(n_rows, min(prod(tensor.shape[:-1]), together))
        sent = n_rows * columns * value
        on_gpu = {one for one in types if one in FORMS} if sent <= BATCH_BYTES else set()
        n_matrices = min(tensor.n_matrices, ceil(n_rows / per_matrix) + 1)
        # what the host reads, widens or makes: one range at a time, and the blocks of all of them
        reads = as_stored is None or len(on_gpu) < len(types)
        made = sum(row_bytes(one, columns) for one in types if one not in on_gpu)
        times = 2 if n_rows > last - first else 1  # blocks of several ranges are put together
        return cls(
            stored=sent if on_gpu else 0,
            beside=_NUMBER * (n_matrices * columns + 3 * n_rows) if on_gpu else 0,
            # with whether a row is odd
            blocks={one: n_rows * (row_bytes(one, columns) + 1) for one in on_gpu},
            host=reads * (last - first) * _VALUE_BYTES * columns + times * n_rows * made,
        )


def _most_by_type(batches: Iterable[_Batch]) -> dict[GGMLQuantizationType, int]:
    """Bytes of the buffer that a thread keeps for each type."""
    found: dict[GGMLQuantizationType, int] = {}
    for batch in batches:
        for one, n_bytes in batch.blocks.items():
            found[one] = max(found.get(one, 0), n_bytes)
    return found
