"""Batches of rows, quantized on a GPU: stored bytes go there, and blocks of all types come back.

A thread reads rows as they are stored into pinned memory, sends them to the GPU on a stream of its
own, and gets the blocks of every type that the files want. While it reads or writes, the rows of
other threads are quantized. What a GPU does not do is done on the host: types that it has no kernel
for, rows that leave a kernel's plain range, and tensors that are transformed or transposed are made
float32 there. All checks are those of a CPU, with the same words.

Memory: a thread holds a batch of at most 16 MiB as stored, and its blocks of all types, in pinned
memory; the GPU holds the batch and its blocks of one type. There are at most 16 threads.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from reap2gguf.errors import DependencyError
from reap2gguf.ggml import TINY
from reap2gguf.gguf_files.rows import stored_bytes
from reap2gguf.options import ComputeOptions
from reap2gguf.quantizing.kernels.cuda import Weighted, load_gpu
from reap2gguf.quantizing.kernels.driver import CudaError
from reap2gguf.quantizing.kernels.nvrtc import CompileError
from reap2gguf.quantizing.quantizer import Quantizer
from reap2gguf.quantizing.stored_rows import StoredRows

if TYPE_CHECKING:
    import numpy.typing as npt
    from gguf import GGMLQuantizationType

    from reap2gguf.checkpoint.weights import Floats
    from reap2gguf.exporting.row_ranges import Batch, BlockMaker, RowRange
    from reap2gguf.progress import Progress
    from reap2gguf.quantizing.kernels.cuda import Blocks, Channel, Gpu


def pays_on_gpu(device: str, n_values: int) -> bool:
    """Whether a GPU, where there is one, quantizes so many weights; auto takes it for much work."""
    return device == "cuda" or (device == "auto" and n_values >= _MUCH_WORK)


def device_threads(n_threads: int) -> int:
    """How many threads feed a GPU, where the processor's work has so many."""
    return min(max(n_threads, _FEWEST_THREADS), _MOST_THREADS)


BATCH_BYTES = 2**24  # as stored
_FEWEST_THREADS, _MOST_THREADS = 4, 16  # they mostly wait: for the disk, and for the GPU
_MUCH_WORK = 2**28  # blocks' values; a processor needs a few seconds for fewer


@dataclass(frozen=True)
class DeviceBlocks:
    """Makes the blocks of batches on a GPU, and on the host what the GPU does not do."""

    host: BlockMaker
    gpu: Gpu
    usable: Collection[Weighted]  # of the types that the GPU does

    def make(
        self, batch: Batch, types: Iterable[GGMLQuantizationType]
    ) -> dict[GGMLQuantizationType, npt.NDArray[np.uint8]]:
        """All rows of a batch as bytes (rows, bytes of a row) of each type.

        They are valid until the same thread calls again. Raises what `BlockMaker.make` does, and
        DependencyError if the GPU fails.
        """
        wanted = list(types)
        is_weighted = self.host.importance_of(batch[0], wanted) is not None
        on_gpu = [one for one in wanted if (one, is_weighted) in self.usable]
        if not on_gpu or _stored_size(self.host, batch) > BATCH_BYTES:
            return self.host.make(batch, wanted)
        try:
            return self._make(batch, on_gpu, wanted)
        except CudaError as error:
            raise DependencyError(
                f"the GPU failed while it quantized {batch[0].tensor.name} ({error}); run the "
                "command again, with CUDA_VISIBLE_DEVICES=-1 if it fails again"
            ) from error

    def _make(
        self,
        batch: Batch,
        on_gpu: Sequence[GGMLQuantizationType],
        wanted: Sequence[GGMLQuantizationType],
    ) -> dict[GGMLQuantizationType, npt.NDArray[np.uint8]]:
        tensor, channel = batch[0].tensor, self.gpu.channel()
        stored = self._send(channel, batch)
        importance, matrix_of = self._importance(batch, wanted)
        n_rows = sum(one.shape[0] for one in stored)
        found = channel.quantize(
            stored[0].dtype, (n_rows, tensor.n_columns), on_gpu, importance, matrix_of
        )
        made = {one: found.blocks[one].data for one in on_gpu}
        place = 0
        for rows, values in zip(batch, stored, strict=True):
            part = slice(place, place := place + values.shape[0])
            if not found.is_finite[part].all():
                raise self.host.not_finite(rows)
            for tensor_type in on_gpu:
                blocks, largest = found.blocks[tensor_type], float(found.largest[part].max())
                self._complete(rows, values, tensor_type, blocks, part, largest)
        on_host = [one for one in wanted if one not in made]
        return made | (self.host.make(batch, on_host) if on_host else {})

    def _send(self, channel: Channel, batch: Batch) -> list[StoredRows]:
        """Read all ranges into pinned memory, each on its way to the GPU as soon as it is there."""
        buffer = channel.stored(_stored_size(self.host, batch))
        found, first = [], 0
        for rows in batch:
            place = stored_bytes(self.host.weights, rows.tensor, rows.slab, rows.first, rows.last)
            if place is not None:
                part, dtype = buffer[first : first + place.count], place.dtype
                self.host.weights.read_bytes(place.name, place.first, part)
            else:
                values = self.host.read(rows)
                part, dtype = buffer[first : first + values.nbytes], "F32"
                part[:] = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
            channel.send(first, first + part.size)
            found.append(StoredRows.of(part, dtype, rows.tensor.n_columns))
            first += part.size
        return found

    def _importance(
        self, batch: Batch, types: Sequence[GGMLQuantizationType]
    ) -> tuple[Floats | None, npt.NDArray[np.int32]]:
        """The importance (M, C) of the batch's matrices, and the matrix of each row."""
        of_matrix = {rows.matrix: rows for rows in batch}
        matrices = {matrix: number for number, matrix in enumerate(of_matrix)}
        matrix_of = np.repeat(
            np.array([matrices[rows.matrix] for rows in batch], np.int32),
            [rows.last - rows.first for rows in batch],
        )
        entries = [self.host.importance_of(rows, types) for rows in of_matrix.values()]
        known = [entry for entry in entries if entry is not None]
        return (np.stack(known) if known else None), matrix_of

    def _complete(
        self,
        rows: RowRange,
        values: StoredRows,
        tensor_type: GGMLQuantizationType,
        blocks: Blocks,
        part: slice,
        largest: float,
    ) -> None:
        """Have libggml make the rows that the GPU could not, and check the range as a CPU does."""
        data, is_odd = blocks.data[part], blocks.is_odd[part]
        importance = self.host.importance_of(rows, (tensor_type,))
        quantizer = self.host.quantizer
        with self.host.named(rows):
            if is_odd.any():
                data[is_odd] = quantizer.ggml.quantize(values[is_odd], tensor_type, importance)
            quantizer.compare(values, data, tensor_type, importance)
        if 0 < largest < TINY:
            self.host.check_precision(rows, values.values, tensor_type, data)


def _stored_size(host: BlockMaker, batch: Batch) -> int:
    """Bytes of a batch as it is sent: as stored, or as float32 if the host has to work on it."""
    found = 0
    for rows in batch:
        place = stored_bytes(host.weights, rows.tensor, rows.slab, rows.first, rows.last)
        as_float32 = 4 * (rows.last - rows.first) * rows.tensor.n_columns
        found += as_float32 if place is None else place.count
    return found


@dataclass(frozen=True)
class Making:
    """What makes blocks, how much it takes at a time, and in how many threads."""

    maker: BlockMaker | DeviceBlocks
    batch_bytes: int
    n_threads: int


@contextmanager
def making(
    host: BlockMaker,
    device: str,
    keys: Collection[Weighted],
    n_values: int,
    n_threads: int,
    progress: Progress,
) -> Iterator[Making]:
    """The GPU if `device` says so and there is one, else the processor; a note if it should be.

    `device` is auto, cpu or cuda; auto takes the GPU for much work only, since its kernels have to
    be compiled and loaded. `keys` are the types that the files want, with importance or without,
    and `n_values` how many weights all files have together.
    """
    on_host = Making(host, 0, n_threads)
    if ComputeOptions(device=device).likely_device == "cpu" or host.quantizer.kernels is None:
        yield on_host
        return
    if not pays_on_gpu(device, n_values):
        yield on_host
        return
    try:
        gpu = load_gpu()
        covered = [key for key in sorted(keys) if gpu.covers(key[0])]
        gpu.prepare(covered, n_threads, progress)
        tried = Quantizer(host.quantizer.ggml, gpu, host.quantizer.checked)
        usable = {key for key in covered if tried.uses_kernel(*key)}
    except (CudaError, CompileError) as error:
        progress.note(f"the GPU does not quantize: {error}; the processor does")
        yield on_host
        return
    for tensor_type, _ in sorted(set(covered) - usable):
        progress.note(
            f"the GPU does not make libggml's bytes of {tensor_type.name}; the processor does"
        )
    try:
        yield Making(DeviceBlocks(host, gpu, usable), BATCH_BYTES, device_threads(n_threads))
    finally:
        gpu.close()
