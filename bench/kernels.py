"""Weights per second per type: our kernels on the CPU and on the GPU, beside libggml.

    python bench/kernels.py [--weights 100000000] [--types Q4_K,Q6_K] [--threads 16]

Every byte that a kernel makes is compared with libggml's, over five kinds of weights: `--weights`
of each, with an importance and without. Rates are in million weights per second: on one thread
from a small part of the weights, on all threads over all of them. The GPU's first rate is that of
the kernel alone, its second one includes the way of the blocks back to the host.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as T

from reap2gguf.ggml import NEEDS_IMPORTANCE, STORABLE, load_ggml
from reap2gguf.machine import available_threads
from reap2gguf.progress import Silent
from reap2gguf.quantizing.kernels.codebooks import codebook
from reap2gguf.quantizing.kernels.compiled import load_kernels
from reap2gguf.quantizing.kernels.cuda import Channel, Gpu, load_gpu
from reap2gguf.quantizing.kernels.driver import CudaError
from reap2gguf.quantizing.kernels.nvrtc import CompileError

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
COLUMNS = 4096
CHUNK = 64  # rows that a thread takes
GPU_ROWS = 4096  # at a time
REPEATS = 10  # of a kernel whose time is taken


def kinds(n_rows: int) -> Iterator[tuple[str, Floats]]:
    """Five kinds of weights, made when they are asked for."""
    random = np.random.default_rng(7)
    shape = n_rows, COLUMNS
    yield "normal", random.standard_normal(shape, np.float32) * np.float32(0.02)
    heavy = random.standard_normal(shape, np.float32)
    heavy /= np.sqrt(random.random(shape, np.float32) + np.float32(0.05))
    heavy.view(np.uint32)[:] &= 0xFFFF0000  # as BF16 stores them
    yield "heavy tails, BF16", heavy
    outliers = random.standard_normal(shape, np.float32) * np.float32(0.02)
    outliers[random.random(shape, np.float32) > 0.999] += np.float32(3)
    yield "outliers", outliers
    yield "few levels", random.integers(-3, 4, shape).astype(np.float32) * np.float32(0.1)
    mixed = random.standard_normal(shape, np.float32)
    mixed *= 10 ** random.uniform(-6, 3, (n_rows, COLUMNS // 32, 1)).astype(np.float32).repeat(
        32, 2
    ).reshape(shape)
    mixed[random.random(shape, np.float32) > 0.7] = 0
    mixed[::5, : COLUMNS // 2] = mixed[::5, :1]
    yield "scales, zeros, constants", mixed


def importance() -> Floats:
    random = np.random.default_rng(8)
    return (random.random(COLUMNS, np.float32) ** 4 * 100).astype(np.float32)


Rates = dict[str, list[float]]


class Bench:
    """Rates and differences of one type, with importance or without."""

    def __init__(self, n_rows: int, n_threads: int, gpu: Gpu | None) -> None:
        self.n_rows, self.n_threads, self.gpu = n_rows, n_threads, gpu
        self.ggml, self.kernels = load_ggml(), load_kernels()

    def run(self, tensor_type: T, weights: Floats | None) -> dict[str, Any]:
        rates: Rates = {}
        different = odd = 0
        kernels, gpu = self.kernels, self.gpu
        for _, rows in kinds(self.n_rows):
            wanted = self._in_threads(
                rates, "ggml", rows, lambda part: self.ggml.quantize(part, tensor_type, weights)
            )
            found = []
            if kernels is not None and kernels.covers(tensor_type):
                found.append(self._on_cpu(rates, rows, tensor_type, weights))
            if gpu is not None and gpu.covers(tensor_type):
                found.append(self._on_gpu(rates, rows, tensor_type, weights))
            for data, is_odd in found:
                different += int((data != wanted).any(axis=1)[~is_odd].sum())
                odd += int(is_odd.sum())
        return {"rates": rates, "different": different, "odd": odd}

    def _on_cpu(
        self, rates: Rates, rows: Floats, tensor_type: T, weights: Floats | None
    ) -> tuple[Bytes, npt.NDArray[np.bool_]]:
        odd_rows: dict[int, npt.NDArray[np.bool_]] = {}
        book = codebook(self.ggml, tensor_type)
        tables = None if book is None else book.pointers()

        def make(part: Floats) -> Bytes:
            assert self.kernels is not None
            data, is_odd = self.kernels.quantize(part, tensor_type, weights, tables)
            odd_rows[part.ctypes.data] = is_odd
            return data

        data = self._in_threads(rates, "cpu", rows, make)
        chunks = range(0, len(rows), CHUNK)
        return data, np.concatenate([odd_rows[rows[first:].ctypes.data] for first in chunks])

    def _in_threads(
        self, rates: Rates, name: str, rows: Floats, make: Callable[[Floats], Bytes]
    ) -> Bytes:
        part = rows[: max(4, CHUNK // 4)].copy()
        make(part)
        begun = time.perf_counter()
        make(part)
        rates.setdefault(f"{name} 1", []).append(part.size / (time.perf_counter() - begun))
        chunks = [rows[first : first + CHUNK] for first in range(0, len(rows), CHUNK)]
        with ThreadPoolExecutor(self.n_threads) as pool:
            begun = time.perf_counter()
            found = list(pool.map(make, chunks))
            rates.setdefault(f"{name} all", []).append(rows.size / (time.perf_counter() - begun))
        return np.concatenate(found)

    def _on_gpu(
        self, rates: Rates, rows: Floats, tensor_type: T, weights: Floats | None
    ) -> tuple[Bytes, npt.NDArray[np.bool_]]:
        assert self.gpu is not None
        channel = self.gpu.channel()
        found, flags = [], []
        per_matrix = None if weights is None else weights.reshape(1, -1)
        for first in range(0, len(rows), GPU_ROWS):
            part = rows[first : first + GPU_ROWS]
            channel.stored(part.nbytes)[:] = part.reshape(-1).view(np.uint8)
            channel.send(0, part.nbytes)

            def once(shape: tuple[int, ...] = part.shape) -> Any:
                return channel.quantize("F32", shape, [tensor_type], per_matrix)

            made = once()
            begun = time.perf_counter()
            made = once()
            seconds = time.perf_counter() - begun
            rates.setdefault("gpu back", []).append(part.size / seconds)
            alone = (_repeated(channel, once, REPEATS) - _repeated(channel, once, 1)) / (
                REPEATS - 1
            )
            rates.setdefault("gpu", []).append(part.size / max(alone, 1e-9))
            blocks = made.blocks[tensor_type]
            found.append(blocks.data.copy())
            flags.append(blocks.is_odd.copy())
        return np.concatenate(found), np.concatenate(flags)


def _repeated(channel: Channel, once: Callable[[], Any], count: int) -> float:
    """Seconds of a call in which the type's kernel runs `count` times."""
    run = channel._run

    def several(key: Any, *rest: Any) -> None:
        for _ in range(count if key.kernel == "quantize" else 1):
            run(key, *rest)

    channel._run = several  # type: ignore[method-assign]
    try:
        begun = time.perf_counter()
        once()
        return time.perf_counter() - begun
    finally:
        channel._run = run  # type: ignore[method-assign]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=int, default=2**21, help="of each kind")
    parser.add_argument("--types", default="", help="such as Q4_K,Q6_K; all that a kernel covers")
    parser.add_argument("--threads", type=int, default=available_threads())
    options = parser.parse_args()
    try:
        gpu: Gpu | None = load_gpu()
    except (CudaError, CompileError) as error:
        gpu = None
        print(f"no GPU: {error}")
    bench = Bench(max(1, options.weights // COLUMNS), options.threads, gpu)
    covered = [
        one
        for one in sorted(STORABLE)
        if any(maker is not None and maker.covers(one) for maker in (bench.kernels, gpu))
    ]
    types = [T[name] for name in options.types.split(",")] if options.types else covered
    target = bench.kernels.target if bench.kernels else "none"
    card = gpu.driver.arch if gpu else "none"
    print(f"libggml {bench.ggml.version}; kernels: {target}; GPU: {card}")
    print(f"{options.threads} threads; {bench.n_rows * COLUMNS:,} weights of each of 5 kinds")
    columns = ("ggml 1", "cpu 1", "ggml all", "cpu all", "gpu", "gpu back")
    print(f"| type | importance | {' | '.join(columns)} | rows that differ | left to libggml |")
    print("|---" * (len(columns) + 4) + "|")
    is_wrong = False
    for tensor_type in types:
        for weights in (importance(), None):
            if weights is None and tensor_type in NEEDS_IMPORTANCE:
                continue
            if gpu is not None and gpu.covers(tensor_type):
                gpu.prepare([(tensor_type, weights is not None)], 1, Silent())
            result = bench.run(tensor_type, weights)
            cells = [
                f"{np.median(result['rates'][name]) / 1e6:,.1f}" if name in result["rates"] else "-"
                for name in columns
            ]
            row = [tensor_type.name, "no" if weights is None else "yes", *cells]
            row += [f"{result['different']:,}", f"{result['odd']:,}"]
            print(f"| {' | '.join(row)} |", flush=True)
            is_wrong |= result["different"] > 0
    return int(is_wrong)


if __name__ == "__main__":
    sys.exit(main())
