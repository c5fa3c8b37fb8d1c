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

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from reap2gguf.errors import DependencyError
from reap2gguf.ggml import is_tiny
from reap2gguf.gguf_files.rows import stored_bytes
from reap2gguf.options import ComputeOptions
from reap2gguf.quantizing.kernels.cuda import load_gpu
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
    from reap2gguf.quantizing.kernels.gpu_kernels import Weighted

BATCH_BYTES = 2**24  # as stored
_FEWEST_THREADS, _MOST_THREADS = 4, 16  # they mostly wait: for the disk, and for the GPU
_MUCH_WORK = 2**28  # blocks' values; a processor needs a few seconds for fewer


def pays_on_gpu(device: str, n_values: int) -> bool:
    """Whether a GPU, where there is one, quantizes so many weights; auto takes it for much work."""
    return device == "cuda" or (device == "auto" and n_values >= _MUCH_WORK)


def device_threads(n_threads: int) -> int:
    """How many threads feed a GPU, where the processor's work has so many."""
    return min(max(n_threads, _FEWEST_THREADS), _MOST_THREADS)


@dataclass(frozen=True)
class DeviceRows:
    """A batch as a GPU has made it; valid until the same thread makes another."""

    stored: StoredRows  # of all ranges, one after another
    parts: Sequence[slice]  # the rows of each range
    largest: Floats  # (rows,): the largest |x| of each row
    blocks: Mapping[GGMLQuantizationType, npt.NDArray[np.uint8]]  # (rows, bytes of a row)


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
        try:
            made = self.rows_of(batch, wanted)
        except CudaError as error:
            raise DependencyError(
                f"the GPU failed while it quantized {batch[0].tensor.name} ({error}); run the "
                "command again, with CUDA_VISIBLE_DEVICES=-1 if it fails again"
            ) from error
        if made is None:
            return self.host.make(batch, wanted)
        for rows, part in zip(batch, made.parts, strict=True):
            largest = float(made.largest[part].max())
            for tensor_type, data in made.blocks.items():
                if is_tiny(largest, tensor_type):
                    self.host.check_precision(rows, made.stored[part], tensor_type, data[part])
        on_host = [one for one in wanted if one not in made.blocks]
        return dict(made.blocks) | (self.host.make(batch, on_host) if on_host else {})

    def rows_of(self, batch: Batch, types: Collection[GGMLQuantizationType]) -> DeviceRows | None:
        """A batch in those of the types that the GPU does; None if it does none of them.

        Rows that it leaves out are made by libggml, and a sample of all blocks is compared with
        libggml's. How small the values are is not looked at. Raises CheckpointError if a value is
        not finite or beyond a type's range, DependencyError if a block is not what libggml makes,
        CudaError if the GPU fails.
        """
        types = [one for one in types if not batch[0].tensor.is_copied_as(one)]
        is_weighted = self.host.importance_of(batch[0], types) is not None
        on_gpu = [one for one in types if (one, is_weighted) in self.usable]
        if not on_gpu or _stored_size(self.host, batch) > BATCH_BYTES:
            return None
        channel = self.gpu.channel()
        stored = self._send(channel, batch)
        importance, matrix_of = self._importance(batch, types)
        found = channel.quantize(stored.dtype, stored.shape, on_gpu, importance, matrix_of)
        ends = np.cumsum([rows.last - rows.first for rows in batch]).tolist()
        parts = [slice(first, last) for first, last in pairwise([0, *ends])]
        for rows, part in zip(batch, parts, strict=True):
            if not found.is_finite[part].all():
                raise self.host.not_finite(rows)
            for tensor_type in on_gpu:
                self._complete(
                    rows, stored.part(part), tensor_type, found.blocks[tensor_type], part
                )
        made = {one: found.blocks[one].data for one in on_gpu}
        return DeviceRows(stored, parts, found.largest, made)

    def _send(self, channel: Channel, batch: Batch) -> StoredRows:
        """Read all ranges into pinned memory, each on its way to the GPU as soon as it is there."""
        buffer = channel.stored(_stored_size(self.host, batch))
        dtype, first = "F32", 0
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
            first += part.size
        return StoredRows.of(buffer, dtype, batch[0].tensor.n_columns)

    def _importance(
        self, batch: Batch, types: Collection[GGMLQuantizationType]
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
    ) -> None:
        """Have libggml make the rows that the GPU could not, and compare a sample with it."""
        data, is_odd = blocks.data[part], blocks.is_odd[part]
        importance = self.host.importance_of(rows, (tensor_type,))
        quantizer = self.host.quantizer
        with self.host.named(rows):
            if is_odd.any():
                data[is_odd] = quantizer.ggml.quantize(values[is_odd], tensor_type, importance)
            quantizer.compare(values, data, tensor_type, importance)


def _stored_size(host: BlockMaker, batch: Batch) -> int:
    """Bytes of a batch as it is sent: as stored, or as float32 if the host has to work on it."""
    found = 0
    for rows in batch:
        place = stored_bytes(host.weights, rows.tensor, rows.slab, rows.first, rows.last)
        as_float32 = 4 * (rows.last - rows.first) * rows.tensor.n_columns
        found += as_float32 if place is None else place.count
    return found


@dataclass(frozen=True)
class Device:
    """A GPU that makes libggml's bytes of some types, and how many threads it needs."""

    gpu: Gpu
    usable: Collection[Weighted]
    n_threads: int

    def blocks_of(self, host: BlockMaker) -> DeviceBlocks:
        """What makes the blocks of these weights, with this importance."""
        return DeviceBlocks(host, self.gpu, self.usable)


@contextmanager
def opened_device(
    quantizer: Quantizer,
    device: str,
    keys: Collection[Weighted],
    n_values: int,
    n_threads: int,
    progress: Progress,
) -> Iterator[Device | None]:
    """The GPU if `device` says so and there is one, else None; a note if there should be one.

    `device` is auto, cpu or cuda; auto takes the GPU for much work only, since its kernels have to
    be compiled and loaded. `keys` are the types that are wanted, with importance or without, and
    `n_values` how many weights all files have together.
    """
    if ComputeOptions(device=device).likely_device == "cpu" or quantizer.kernels is None:
        yield None
        return
    if not pays_on_gpu(device, n_values):
        yield None
        return
    try:
        gpu = load_gpu()
        covered = [key for key in sorted(keys) if gpu.covers(key[0])]
        gpu.prepare(covered, n_threads, progress)
        tried = Quantizer(quantizer.ggml, gpu, quantizer.checked)
        usable = {key for key in covered if tried.uses_kernel(*key)}
    except (CudaError, CompileError) as error:
        progress.note(f"the GPU does not quantize: {error}; the processor does")
        yield None
        return
    for tensor_type, _ in sorted(set(covered) - usable):
        progress.note(
            f"the GPU does not make libggml's bytes of {tensor_type.name}; the processor does"
        )
    try:
        yield Device(gpu, usable, device_threads(n_threads))
    finally:
        with suppress(CudaError):  # a GPU that failed fails again, and that has been reported
            gpu.close()


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
    """What makes the blocks of an export: `opened_device`, else the processor."""
    with opened_device(host.quantizer, device, keys, n_values, n_threads, progress) as found:
        if found is None:
            yield Making(host, 0, n_threads)
        else:
            yield Making(found.blocks_of(host), BATCH_BYTES, found.n_threads)
