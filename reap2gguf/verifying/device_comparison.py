"""GGUF files against blocks that a GPU makes again, a batch of ranges at a time.

A thread reads a batch of the weights into pinned memory, and the same rows of each file into a
buffer of its own. The GPU makes the blocks (`device_blocks.py`). Equal bytes, and a sample that the
processor dequantizes and compares with the weights, settle a batch in a few long steps, in which no
thread holds the interpreter's lock. Whatever is not settled, for any reason, is compared by
`comparison.py` as on a machine without a GPU: so violations, and their words, are the same.

Memory: of a thread, what `device_blocks.py` says, a batch of one file, and of each range's values
as float32 three times the sample.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from reap2gguf.errors import DependencyError, Reap2ggufError
from reap2gguf.ggml import UNWEIGHTED_TYPES
from reap2gguf.gguf_files.tensor_bytes import TensorBytes, opened_tensors
from reap2gguf.quantizing.kernels.driver import CudaError
from reap2gguf.verifying.comparison import are_equal, sample_step
from reap2gguf.verifying.matrices import is_within_its_type

if TYPE_CHECKING:
    import numpy.typing as npt

    from reap2gguf.checkpoint.weights import Floats
    from reap2gguf.exporting.device_blocks import Device, DeviceRows
    from reap2gguf.exporting.row_ranges import Batch, BlockMaker
    from reap2gguf.models.description import GgufTensor
    from reap2gguf.progress import Progress
    from reap2gguf.quantizing.kernels.gpu_kernels import Weighted
    from reap2gguf.verifying.comparison import Comparison

Comparisons = Mapping[str, Sequence["Comparison"]]  # of the files that hold each tensor


@dataclass(frozen=True)
class DeviceComparison:
    """Compares batches with what a GPU makes of them. Threads share it."""

    device: Device
    files: Mapping[int, TensorBytes]  # by the identity of a `Comparison`
    progress: Progress
    _failed: threading.Event = field(default_factory=threading.Event, init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)
    _local: threading.local = field(default_factory=threading.local, init=False)

    def unsettled(self, batch: Batch, comparisons: Sequence[Comparison]) -> list[Comparison]:
        """The files of which it is not known that a batch is right.

        Raises DependencyError if a kernel does not make libggml's bytes.
        """
        makers = {id(one.blocks): one.blocks for one in comparisons}
        settled: set[int] = set()
        for maker in makers.values():
            group = [one for one in comparisons if one.blocks is maker and self._may(one, batch)]
            try:
                if group and not self._failed.is_set():
                    settled |= self._settled(batch, maker, group)
            except CudaError as error:
                self._fail(error)
            except DependencyError:
                raise
            except (Reap2ggufError, OSError):
                continue  # it happens again in the comparison by range, which says what it is
        return [one for one in comparisons if id(one) not in settled]

    def _may(self, one: Comparison, batch: Batch) -> bool:
        """Whether a file can be settled: without a violation in this tensor, by equal bytes."""
        is_clean = batch[0].tensor.name not in one.found
        return is_clean and id(one) in self.files and one.makes_again(one.type_of(batch[0]))

    def _settled(self, batch: Batch, maker: BlockMaker, group: Sequence[Comparison]) -> set[int]:
        types = {one.type_of(batch[0]) for one in group}
        if (made := self.device.blocks_of(maker).rows_of(batch, types)) is None:
            return set()
        sample = _Sample.of(batch, made)
        return {id(one) for one in group if self._is_right(one, batch, made, sample)}

    def _is_right(self, one: Comparison, batch: Batch, made: DeviceRows, sample: _Sample) -> bool:
        """Whether a file's bytes are those of the GPU, and a sample is near to the weights."""
        name, tensor_type = batch[0].tensor.name, one.type_of(batch[0])
        if (wanted := made.blocks.get(tensor_type)) is None:
            return False
        raw = self._buffer(wanted.size)
        self.files[id(one)].read(name, batch[0].first_in_tensor, raw)
        rows = raw.reshape(wanted.shape)
        if not are_equal(rows, wanted):
            return False
        found = one.quantizer.dequantize(rows[sample.rows], tensor_type)
        return is_within_its_type(found, sample.stored, tensor_type, sample.firsts)

    def _buffer(self, n_bytes: int) -> npt.NDArray[np.uint8]:
        """Bytes that this thread may use until it asks again."""
        if n_bytes > getattr(self._local, "n_bytes", 0):
            self._local.buffer = None  # given back before a larger one is taken
            self._local.buffer, self._local.n_bytes = np.empty(n_bytes, np.uint8), n_bytes
        found: npt.NDArray[np.uint8] = self._local.buffer[:n_bytes]
        return found

    def _fail(self, error: CudaError) -> None:
        """Leave the rest to the processor, and say so once."""
        with self._lock:
            if self._failed.is_set():
                return
            self._failed.set()
        self.progress.note(
            f"the GPU failed while it verified ({error}); the processor verifies the rest"
        )


@dataclass(frozen=True)
class _Sample:
    """Rows spread over each range of a batch."""

    rows: npt.NDArray[np.intp]  # their numbers in the batch
    firsts: Sequence[int]  # where those of each range begin
    stored: Floats  # (rows, columns)

    @classmethod
    def of(cls, batch: Batch, made: DeviceRows) -> _Sample:
        chosen = [
            np.arange(part.start, part.stop, sample_step(rows.n_values))
            for rows, part in zip(batch, made.parts, strict=True)
        ]
        firsts = np.cumsum([0, *(len(numbers) for numbers in chosen[:-1])]).tolist()
        rows = np.concatenate(chosen)
        return cls(rows, firsts, made.stored[rows])


@contextmanager
def comparing_on(
    device: Device, comparisons: Comparisons, progress: Progress
) -> Iterator[DeviceComparison]:
    """A comparison on an open GPU, with all files open.

    A file that cannot be opened is not among them, and is left to the comparison by range.
    """
    files = {id(one): one for group in comparisons.values() for one in group}
    opened = {}
    with ExitStack() as stack:
        for number, one in files.items():
            with suppress(OSError):  # the comparison by range reports it
                opened[number] = stack.enter_context(opened_tensors(one.header))
        yield DeviceComparison(device, opened, progress)


def wanted(
    tensors: Mapping[str, GgufTensor], comparisons: Comparisons
) -> tuple[set[Weighted], int]:
    """The types that are made again, with importance or without, and of how many weights."""
    keys: set[Weighted] = set()
    n_values = 0
    for name, group in comparisons.items():
        for maker in {id(one.blocks): one.blocks for one in group}.values():
            pairs = [(one, one.header.tensors[name].tensor_type) for one in group]
            types = [of for one, of in pairs if one.blocks is maker and one.makes_again(of)]
            needs = any(one.name not in UNWEIGHTED_TYPES for one in types)
            keys |= {(one, needs and name in maker.importance) for one in types}
            n_values += len(types) * prod(tensors[name].shape)
    return keys, n_values
