"""Compares the values of GGUF files with the weights that they were made from, row by row.

All files are compared in one pass: a range of the weights is read once, its blocks of each type are
made once, and every file's bytes are compared with them (`comparison.py`). A GPU makes them where
there is one and much is to do (`device_comparison.py`).

Memory: what a thread holds of a range, at most 16 MiB as float32, is in `comparison.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from reap2gguf.errors import Reap2ggufError
from reap2gguf.exporting.device_blocks import BATCH_BYTES, opened_device
from reap2gguf.exporting.row_ranges import (
    Batch,
    BlockMaker,
    RowRange,
    batches,
    check_imatrix,
    made_types,
    work_through,
)
from reap2gguf.ggml import holds_weights
from reap2gguf.gguf_files.rows import MAX_VALUES
from reap2gguf.gguf_files.tensor_types import is_ik
from reap2gguf.quantizing.ik.workers import is_installed, needs_package
from reap2gguf.quantizing.quantizer import load_quantizer
from reap2gguf.verifying.comparison import Comparison, Original
from reap2gguf.verifying.device_comparison import comparing_on, wanted

if TYPE_CHECKING:
    from reap2gguf.checkpoint.weights import Weights
    from reap2gguf.gguf_files.reader import GgufHeader, GgufTensorInfo
    from reap2gguf.models.description import GgufTensor
    from reap2gguf.progress import Progress
    from reap2gguf.quantizing.quantizer import Quantizer
    from reap2gguf.verifying.device_comparison import DeviceComparison
    from reap2gguf.verifying.exactness import Exactness

_MAX_ROW = 2**22  # values; a row is read at once


def unreadable(header: GgufHeader) -> str:
    """Why values of a file cannot be read here, though they are sound types; "" if they can.

    Its other tensors are compared.
    """
    kinds = sorted({one.tensor_type.name for one in header.tensors.values() if _is_unread(one)})
    if not kinds:
        return ""
    return f"values in {', '.join(kinds)} not read: {needs_package('this')}"


def _is_unread(info: GgufTensorInfo) -> bool:
    return is_ik(info.tensor_type) and not is_installed()


def check_values(header: GgufHeader, n_threads: int, progress: Progress) -> Iterator[str]:
    """Violations without weights to compare with: NaN and infinity."""
    quantizer = load_quantizer()

    def check(info: GgufTensorInfo) -> str | None:
        where = f"{header.path.name}: {info.name}"
        if _is_unread(info):
            return None
        if not holds_weights(info.tensor_type):
            return f"{where} is {info.tensor_type.name}, which is not a type for weights"
        if info.shape[-1] > _MAX_ROW:
            return f"{where} has rows of {info.shape[-1]:,} values"
        n_rows = prod(info.shape[:-1])
        step = max(1, MAX_VALUES // info.shape[-1])
        for first in range(0, n_rows, step):
            raw = header.read(info.name, first, min(first + step, n_rows))
            finite = np.isfinite(quantizer.dequantize(raw, info.tensor_type)).all(axis=1)
            if not finite.all():
                matrix = (first + int(np.argmin(finite))) * info.shape[0] // n_rows
                which = f" expert {matrix}" if len(info.shape) == 3 else ""
                return f"{where}{which} holds NaN or infinite values"
        return None

    infos = list(header.tensors.values())
    with (
        progress.task(_title([header]), sum(info.n_bytes for info in infos), "bytes") as task,
        ThreadPoolExecutor(n_threads) as pool,
    ):
        for info, violation in zip(infos, pool.map(check, infos), strict=True):
            task.advance(info.n_bytes)
            if violation:
                yield violation


@dataclass(frozen=True)
class FileValues:
    """A GGUF file and the tensors, of those that it has in their shapes, that are compared."""

    header: GgufHeader
    tensors: Sequence[GgufTensor]
    exactness: Exactness

    @property
    def storable(self) -> list[GgufTensor]:
        """Tensors of types that can be read."""
        infos = self.header.tensors
        return [
            one
            for one in self.tensors
            if holds_weights(infos[one.name].tensor_type) and not _is_unread(infos[one.name])
        ]

    @property
    def was_weighted(self) -> bool:
        """Whether the header says that an importance matrix was used."""
        return any(key.startswith("quantize.imatrix.") for key in self.header.metadata)


@dataclass
class Compared:
    """What comparing a file has found."""

    violations: list[str]  # the first of each tensor
    is_exact: bool = False  # whether all of its bytes are those that were made again
    differing: list[str] = field(default_factory=list)  # types of other bytes, within bounds
    is_refused: bool = False  # nothing was compared, and a violation says why


def compare_values(
    header: GgufHeader,
    weights: Weights,
    tensors: Sequence[GgufTensor],
    exactness: Exactness,
    n_threads: int,
    progress: Progress,
    device: str = "auto",
) -> Compared:
    """`compare_files` of one file."""
    file = FileValues(header, tensors, exactness)
    return compare_files([file], weights, n_threads, progress, device)[0]


def compare_files(
    files: Sequence[FileValues],
    weights: Weights,
    n_threads: int,
    progress: Progress,
    device: str = "auto",
) -> list[Compared]:
    """What is found in each file, in one pass over the weights.

    With `device` cuda, or auto where much is to do, a GPU makes the blocks that it has kernels for.
    What is found does not depend on it.

    Raises DependencyError if a compiled kernel does not make libggml's bytes, and CheckpointError
    if the weights are gone.
    """
    found = [_refusals(file) for file in files]
    quantizer = load_quantizer()
    makers: dict[int, BlockMaker] = {}  # files with one importance matrix share their blocks
    comparisons: dict[int, Comparison] = {}
    for number, file in enumerate(files):
        imatrix = file.exactness.imatrix
        if not found[number].is_refused:
            entries = imatrix.entries if imatrix else {}
            maker = makers.setdefault(id(imatrix), BlockMaker(weights, quantizer, entries))
            knows = _knows_importance(file)
            comparisons[number] = Comparison(file.header, maker, file.exactness, knows)
    jobs = [(files[number].storable, one) for number, one in comparisons.items()]
    _work(_Pass(weights, quantizer, jobs), n_threads, progress, device)
    for number, one in comparisons.items():
        names = [tensor.name for tensor in files[number].storable if tensor.name in one.found]
        found[number].violations += [one.found[name][1] for name in names]
        found[number].is_exact = not one.bounded
        found[number].differing = sorted(kind.name for kind in one.differing)
    return found


def _refusals(file: FileValues) -> Compared:
    """What of a file cannot be compared at all."""
    where, imatrix, found = file.header.path.name, file.exactness.imatrix, Compared([])
    types = {tensor.name: file.header.tensors[tensor.name].tensor_type for tensor in file.tensors}
    for name, tensor_type in types.items():
        if not holds_weights(tensor_type):
            problem = f"{name} is {tensor_type.name}, which is not a type for weights"
            found.violations.append(f"{where}: {problem}")
    if file.exactness.every_type and file.was_weighted and imatrix is None:
        found.is_refused = True
        found.violations.append(
            f"{where}: was quantized with an importance matrix, which is needed to compare it byte "
            "for byte; pass it"
        )
    elif imatrix is not None:
        try:
            check_imatrix(file.tensors, made_types(file.tensors, [types]), imatrix)
        except Reap2ggufError as error:
            found.is_refused = True
            found.violations.append(f"{where}: {error}")
    return found


def _knows_importance(file: FileValues) -> bool:
    """Whether what a file was quantized with, if anything, is there."""
    is_ours = any(key.startswith("reap2gguf.") for key in file.header.metadata)
    return file.exactness.imatrix is not None or (is_ours and not file.was_weighted)


class _Pass:
    """One pass over the weights, for all files that hold a tensor of them."""

    def __init__(
        self,
        weights: Weights,
        quantizer: Quantizer,
        jobs: Sequence[tuple[Sequence[GgufTensor], Comparison]],
    ) -> None:
        self.weights, self.quantizer = weights, quantizer
        self.tensors: dict[str, GgufTensor] = {}
        self.comparisons: dict[str, list[Comparison]] = {}  # by tensor
        self.headers = [comparison.header for _, comparison in jobs]
        self.total = 0  # bytes of tensors in all files
        for tensors, comparison in jobs:
            for tensor in tensors:
                self.tensors.setdefault(tensor.name, tensor)
                self.comparisons.setdefault(tensor.name, []).append(comparison)
                self.total += comparison.header.tensors[tensor.name].n_bytes

    def check(self, batch: Batch, gpu: DeviceComparison | None) -> int:
        """Compare a batch with every file; how many bytes the files have of it."""
        name = batch[0].tensor.name
        comparisons = self.comparisons[name]
        left = comparisons if gpu is None else gpu.unsettled(batch, comparisons)
        for rows in batch if left else ():
            self._check_range(rows, left)
        n_rows = sum(rows.last - rows.first for rows in batch)
        return sum(n_rows * one.header.tensors[name].row_bytes for one in comparisons)

    def _check_range(self, rows: RowRange, comparisons: Sequence[Comparison]) -> None:
        wanting = [one for one in comparisons if one.wants(rows)]
        # those that share blocks side by side: of one type at a time
        wanting.sort(key=lambda one: (id(one.blocks), one.type_of(rows).value))
        if not wanting:
            return
        original = Original(rows, wanting[0].blocks)
        for one in wanting:
            one.check(original)


def _work(compare: _Pass, n_threads: int, progress: Progress, device: str) -> None:
    if not compare.headers:
        return
    with (
        progress.task(_title(compare.headers), compare.total, "bytes") as task,
        _on_gpu(compare, n_threads, progress, device) as gpu,
    ):

        def work(batch: Batch) -> None:
            task.advance(compare.check(batch, gpu))

        ranges = batches(compare.weights, list(compare.tensors.values()), BATCH_BYTES if gpu else 0)
        work_through(work, compare.weights, ranges, gpu.device.n_threads if gpu else n_threads)


@contextmanager
def _on_gpu(
    compare: _Pass, n_threads: int, progress: Progress, device: str
) -> Iterator[DeviceComparison | None]:
    """The GPU as `opened_device` has it; None for the processor."""
    if device == "cpu":
        yield None
        return
    keys, n_values = wanted(compare.tensors, compare.comparisons)
    quantizer = compare.quantizer
    with opened_device(quantizer, device, keys, n_values, n_threads, progress) as found:
        if found is None:
            yield None
        else:
            with comparing_on(found, compare.comparisons, progress) as gpu:
                yield gpu


def _title(headers: Sequence[GgufHeader]) -> str:
    what = headers[0].path.name if len(headers) == 1 else f"{len(headers)} GGUF files"
    return f"Verifying {what}"
