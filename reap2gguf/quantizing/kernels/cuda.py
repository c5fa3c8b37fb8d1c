"""The quantizers on a GPU: stored rows go there once, and blocks of every wanted type come back.

Each thread has a channel: a stream of its own and its buffers, so that one thread's rows travel
while another's are quantized. Kernels are compiled when they are first needed (`nvrtc.py`).

Memory of a channel: the rows as stored, and of the GPU the blocks of one type, of the host, pinned,
those of all types. Besides, the driver keeps 1 to 3 KB of the GPU's memory for each thread that can
run on the card at the same time: about half a GiB on an H100.
"""

from __future__ import annotations

import ctypes
import threading
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from reap2gguf.ggml import NEEDS_IMPORTANCE, load_ggml
from reap2gguf.gguf_files.tensor_types import row_bytes
from reap2gguf.progress import working
from reap2gguf.quantizing.kernels.codebooks import codebook
from reap2gguf.quantizing.kernels.driver import CudaError, Driver, Function, Memory, Stream
from reap2gguf.quantizing.kernels.gpu_kernels import FORMS, Key, Weighted
from reap2gguf.quantizing.kernels.nvrtc import (
    Compiler,
    cache_file,
    keep,
    load_compiler,
    read_cached,
)

if TYPE_CHECKING:
    from reap2gguf.ggml import Bytes, Floats
    from reap2gguf.progress import Progress
    from reap2gguf.quantizing.kernels.codebooks import Tables
    from reap2gguf.quantizing.stored_rows import StoredRows

STORED_AS = {"F32": 0, "F16": 1, "BF16": 2}  # as gpu.cu numbers them
_THREADS = 128  # in a block; find_mean_squares has 32
_FEWEST_IN_A_GROUP = 16  # values that a thread reads, or 32
_ROWS_OF_LARGEST = 8  # rows that a block looks at, a warp each
_FIND_LARGEST, _FIND_MEAN_SQUARES = Key("find_largest"), Key("find_mean_squares")
_ALIGNED = 256  # bytes at which tables begin
_COMPILING = "Compiling kernels, once on this machine"


@dataclass(frozen=True)
class Blocks:
    """Rows of one type: their bytes (R, bytes of a row), and which (R,) libggml must make."""

    data: npt.NDArray[np.uint8]
    is_odd: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Quantized:
    """What a GPU made of rows: valid until its channel is used again."""

    largest: Floats  # (R,): the largest |x| of each row; infinity or NaN if one is not finite
    blocks: dict[GGMLQuantizationType, Blocks]

    @property
    def is_finite(self) -> npt.NDArray[np.bool_]:
        """Which rows (R,) are finite; the blocks of others mean nothing."""
        return np.isfinite(self.largest)


@dataclass(frozen=True)
class Book:
    """A type's codebook in the GPU's memory; null where a type has none."""

    memory: Memory
    tables: ctypes.c_void_p  # `struct Codebook` of codebooks.h
    entries: ctypes.c_void_p  # what dequantizing needs

    @classmethod
    def of(cls, tensor_type: GGMLQuantizationType, driver: Driver, stream: Stream) -> Book:
        """Make it, and wait until it is there."""
        memory, found = Memory(driver, is_pinned=False), codebook(load_ggml(), tensor_type)
        if found is None:
            return cls(memory, ctypes.c_void_p(0), ctypes.c_void_p(0))
        parts = [
            one.reshape(-1).view(np.uint8) for one in (found.places, found.codes, found.entries)
        ]
        starts = [_ALIGNED]  # after the two addresses
        for part in parts:
            starts.append(starts[-1] + -(-part.nbytes // _ALIGNED) * _ALIGNED)
        base = memory.at_least(starts[-1])
        image = np.zeros(starts[-1], np.uint8)
        image[:16] = np.array([base + start for start in starts[:2]], np.uint64).view(np.uint8)
        for start, part in zip(starts, parts, strict=False):
            image[start : start + part.nbytes] = part
        stream.to_device(base, image)
        stream.wait()
        return cls(memory, ctypes.c_void_p(base), ctypes.c_void_p(base + starts[2]))


@dataclass(frozen=True)
class _Compiled:
    """What kernels are compiled for, and by which versions; the first GPU does not change."""

    arch: str
    versions: tuple[int, ...]


_COMPILED: dict[_Compiled, _Compiled] = {}  # of this process; the first one that is equal


class Gpu:
    """The quantizers on this process's first GPU. Threads may share one."""

    def __init__(self, driver: Driver, compiler: Compiler) -> None:
        self.driver, self._compiler = driver, compiler
        compiled = _Compiled(driver.arch, (*compiler.version, driver.version))
        self.tested_as = _COMPILED.setdefault(compiled, compiled)  # each export loads them again
        self._functions: dict[Key, Function] = {}
        self._books: dict[GGMLQuantizationType, Book] = {}
        self._lock = threading.Lock()
        self._local = threading.local()
        self._channels: list[Channel] = []

    def covers(self, tensor_type: GGMLQuantizationType) -> bool:
        """Whether it quantizes to this type."""
        return tensor_type in FORMS

    def prepare(self, types: Iterable[Weighted], n_threads: int, progress: Progress) -> None:
        """Compile the kernels of these types, or take them from the cache, in threads.

        Says so if it has to compile. Raises CompileError or CudaError if it cannot.
        """
        wanted = [_FIND_LARGEST, *(Key("quantize", *one) for one in types)]
        if any(one.tensor_type and FORMS[one.tensor_type].weighs_rows for one in wanted):
            wanted.append(_FIND_MEAN_SQUARES)
        files = {self._cache_file(key): key for key in wanted}  # some kernels share one
        missing = [key for file, key in files.items() if read_cached(file) is None]
        if missing:
            with working(progress, _COMPILING), ThreadPoolExecutor(n_threads) as pool:
                list(pool.map(self._code, missing))
        for key in wanted:
            self.function(key)

    def function(self, key: Key) -> Function:
        """A kernel that is ready to run."""
        with self._lock:
            if key not in self._functions:
                self.driver.enter()
                (self._functions[key],) = self.driver.load(self._code(key), key.kernel)
            return self._functions[key]

    def book(self, tensor_type: GGMLQuantizationType, stream: Stream) -> Book:
        """The codebook of a type, sent to the GPU when it is first asked for."""
        with self._lock:
            if tensor_type not in self._books:
                self._books[tensor_type] = Book.of(tensor_type, self.driver, stream)
            return self._books[tensor_type]

    def _code(self, key: Key) -> bytes:
        path = self._cache_file(key)
        if (code := read_cached(path)) is None:
            code = self._compiler.compile(self.driver.arch, key.definitions, key.registers)
            keep(path, code)
        return code

    def _cache_file(self, key: Key) -> Path:
        versions = (*self._compiler.version, self.driver.version)
        return cache_file(self.driver.arch, key.definitions, key.registers, versions)

    def channel(self) -> Channel:
        """The channel of this thread."""
        self.driver.enter()
        if not hasattr(self._local, "channel"):
            self._local.channel = Channel(self)
            with self._lock:
                self._channels.append(self._local.channel)
        found: Channel = self._local.channel
        return found

    def quantize(
        self,
        rows: Floats | StoredRows,
        tensor_type: GGMLQuantizationType,
        importance: Floats | None = None,
        tables: Tables | None = None,
    ) -> tuple[Bytes, npt.NDArray[np.bool_]]:
        """Rows (R, C) as `tensor_type`, as `Kernels.quantize` of `compiled.py` does.

        `tables` are those of the host; the GPU has its own.
        """
        source = np.ascontiguousarray(rows[:], dtype=np.float32)
        channel = self.channel()
        channel.stored(source.nbytes)[:] = source.reshape(-1).view(np.uint8)
        channel.send(0, source.nbytes)
        weights = None if importance is None else importance.reshape(1, -1)
        found = channel.quantize("F32", source.shape, [tensor_type], weights)
        blocks = found.blocks[tensor_type]
        return blocks.data.copy(), blocks.is_odd | ~found.is_finite

    def dequantize(self, raw: Bytes, tensor_type: GGMLQuantizationType) -> Floats:
        """The float32 values (R, C) of rows (R, bytes of a row), as `Ggml.dequantize` has them."""
        return self.channel().dequantize(raw, tensor_type).copy()

    def close(self) -> None:
        """Give back the memory of all channels, whose threads have ended or use them no more."""
        self.driver.enter()
        with self._lock:
            for channel in self._channels:
                channel.close()
            for book in self._books.values():
                book.memory.free()
            self._channels.clear()
            self._books.clear()
            self._local = threading.local()


@dataclass
class Channel:
    """What one thread needs: a stream, buffers of the GPU and pinned ones of the host."""

    gpu: Gpu
    _device: defaultdict[str, Memory] = field(init=False)
    _pinned: defaultdict[str, Memory] = field(init=False)

    def __post_init__(self) -> None:
        driver = self.gpu.driver
        self._stream = Stream(driver)
        self._device = defaultdict(lambda: Memory(driver, is_pinned=False))
        self._pinned = defaultdict(lambda: Memory(driver, is_pinned=True))

    def stored(self, n_bytes: int) -> npt.NDArray[np.uint8]:
        """A pinned buffer for rows as they are stored: to be filled, and sent part by part."""
        self._device["stored"].at_least(n_bytes)
        return self._pinned["stored"].view(n_bytes)

    def send(self, first: int, last: int) -> None:
        """Begin to copy bytes [first, last) of the buffer to the GPU; returns at once."""
        source = self._pinned["stored"].view(last)[first:]
        self._stream.to_device(self._device["stored"].address + first, source)

    def quantize(
        self,
        dtype: str,
        shape: tuple[int, ...],
        types: Collection[GGMLQuantizationType],
        importance: Floats | None = None,
        matrix_of: Sequence[int] | npt.NDArray[np.int32] | None = None,
    ) -> Quantized:
        """The rows (R, C) that were sent, stored as `dtype`, as blocks of each type.

        `importance` is (M, C), and `matrix_of` (R,) says which of the M matrices a row is of; the
        first one if it is left out. Raises CudaError if the GPU fails, and ValueError for a type
        that needs an importance and has none.
        """
        n_rows, n_columns = shape
        if importance is None and (without := sorted(NEEDS_IMPORTANCE.intersection(types))):
            raise ValueError(f"{without[0].name} needs an importance")
        given = np.zeros(n_rows, np.int32) if matrix_of is None else np.asarray(matrix_of, np.int32)
        rows = (
            ctypes.c_void_p(self._device["stored"].address),
            ctypes.c_int(STORED_AS[dtype]),
            ctypes.c_int(n_rows),
            ctypes.c_int(n_columns),
        )
        weights = ctypes.c_void_p(0)
        matrices = self._put("matrices", given)
        if importance is not None:
            assert importance.shape[1] == n_columns
            weights = self._put("importance", np.ascontiguousarray(importance, np.float32))
        weighs_rows = importance is not None and any(FORMS[one].weighs_rows for one in types)
        largest, squares = self._measure(rows, n_rows, weighs_rows)
        most = n_rows * max((row_bytes(one, n_columns) for one in types), default=0)
        target = ctypes.c_void_p(self._device["blocks"].at_least(max(1, most)))
        is_odd = ctypes.c_void_p(self._device["odd"].at_least(n_rows))
        found_largest = self._get("largest", 4 * n_rows, largest).view(np.float32)
        made_of = *rows, weights, matrices, largest, squares
        blocks = {
            one: self._make(
                Key("quantize", one, importance is not None), shape, made_of, target, is_odd
            )
            for one in types
        }
        self._stream.wait()
        return Quantized(found_largest, blocks)

    def _measure(
        self, rows: Sequence[object], n_rows: int, weighs_rows: bool
    ) -> tuple[ctypes.c_void_p, ctypes.c_void_p]:
        """Where the GPU has the largest |x| of each row, and its mean square, if it is needed."""
        largest = ctypes.c_void_p(self._device["largest"].at_least(4 * n_rows))
        n_blocks = -(-n_rows // _ROWS_OF_LARGEST)
        self._run(_FIND_LARGEST, n_blocks, 32 * _ROWS_OF_LARGEST, *rows, largest)
        if not weighs_rows:
            return largest, ctypes.c_void_p(0)
        squares = ctypes.c_void_p(self._device["squares"].at_least(4 * n_rows))
        self._run(_FIND_MEAN_SQUARES, -(-n_rows // 32), 32, *rows, squares)
        return largest, squares

    def _make(
        self,
        key: Key,
        shape: tuple[int, ...],
        made_of: Sequence[object],
        target: ctypes.c_void_p,
        is_odd: ctypes.c_void_p,
    ) -> Blocks:
        """Begin to make the rows as blocks of the key's type, by way of two buffers on the GPU."""
        tensor_type = key.tensor_type
        assert tensor_type is not None
        n_rows, n_columns = shape
        n_blocks = n_rows * n_columns // GGML_QUANT_SIZES[tensor_type][0]
        n_threads = n_blocks * FORMS[tensor_type].n_threads
        self._stream.clear(is_odd.value or 0, n_rows)
        tables = self.gpu.book(tensor_type, self._stream).tables
        self._run(key, -(-n_threads // _THREADS), _THREADS, *made_of, tables, target, is_odd)
        width = row_bytes(tensor_type, n_columns)
        data = self._get(f"{tensor_type.name} blocks", n_rows * width, target)
        odd = self._get(f"{tensor_type.name} odd", n_rows, is_odd)
        return Blocks(data.reshape(n_rows, width), odd.view(np.bool_))

    def dequantize(self, raw: Bytes, tensor_type: GGMLQuantizationType) -> Floats:
        """The values (R, C) of rows (R, bytes of a row); valid until the channel is used again.

        Raises CudaError if the GPU fails.
        """
        columns, size = GGML_QUANT_SIZES[tensor_type]
        n_blocks = raw.size // size
        source = self._put("raw", np.ascontiguousarray(raw))
        target = ctypes.c_void_p(self._device["values"].at_least(max(1, 4 * n_blocks * columns)))
        key = Key("dequantize", tensor_type)
        n_groups = -(-n_blocks * columns // _FEWEST_IN_A_GROUP)
        self._run(
            key,
            -(-n_groups // _THREADS),
            _THREADS,
            source,
            ctypes.c_int64(n_blocks),
            self.gpu.book(tensor_type, self._stream).entries,
            target,
        )
        values = self._get("values", 4 * n_blocks * columns, target)
        self._stream.wait()
        return values.view(np.float32).reshape(len(raw), -1)

    def _run(self, key: Key, n_blocks: int, n_threads: int, *arguments: object) -> None:
        self._stream.launch(self.gpu.function(key), n_blocks, n_threads, arguments)

    def _put(self, name: str, values: npt.NDArray[np.generic]) -> ctypes.c_void_p:
        """Begin to copy an array to the GPU; its address there."""
        buffer = self._pinned[name].view(values.nbytes)
        buffer[:] = values.reshape(-1).view(np.uint8)
        address = self._device[name].at_least(max(1, values.nbytes))
        self._stream.to_device(address, buffer)
        return ctypes.c_void_p(address)

    def _get(self, name: str, n_bytes: int, source: ctypes.c_void_p) -> npt.NDArray[np.uint8]:
        """Begin to copy bytes from the GPU, into pinned memory."""
        buffer = self._pinned[name].view(n_bytes)
        self._stream.to_host(buffer, source.value or 0)
        return buffer

    def close(self) -> None:
        """Give all memory back."""
        with suppress(CudaError):  # what failed before fails again, and has been reported
            self._stream.wait()
        for memory in (*self._device.values(), *self._pinned.values()):
            memory.free()


def load_gpu() -> Gpu:
    """The first GPU. Raises CudaError without one, CompileError without a compiler for it."""
    driver = Driver()
    return Gpu(driver, load_compiler())
