"""Weights to GGUF files: every tensor is read once, for however many files.

The work is cut into batches of whole rows of one tensor (`row_ranges.py`). A batch is read, widened
to float32 and transformed, quantized once for each distinct type that the files want, and written
to its position in each file. A GPU may quantize (`device_blocks.py`). No intermediate file is
written. With a journal, tensors that are on the disk already are not written again. The importance
may still be computed meanwhile: the export writes what it can, and then each tensor when its
importance is final (`awaited.py`).

Memory: a thread holds one batch and its quantized forms, 2 to 16 MiB for each distinct type.
Besides the ranges there is the imatrix: 4 bytes per column, and 4 MiB for each file that is hashed.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from reap2gguf.atomic import OutputFile, open_file, part_of, rename
from reap2gguf.errors import OutputError
from reap2gguf.exporting.awaited import AwaitedImportance
from reap2gguf.exporting.device_blocks import Making, making
from reap2gguf.exporting.header import GgufLayout, lay_out
from reap2gguf.exporting.row_ranges import (
    Batch,
    BlockMaker,
    RowRange,
    batches,
    check_imatrix,
    made_types,
    work_through,
)
from reap2gguf.files import is_own_file
from reap2gguf.gguf_files.tensor_types import row_bytes
from reap2gguf.quantizing.quantizer import SAMPLE, load_quantizer

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

    from reap2gguf.checkpoint.weights import Weights
    from reap2gguf.disk.hashing import Hashes
    from reap2gguf.exporting.header_facts import HeaderFacts
    from reap2gguf.exporting.journal import ExportJournal
    from reap2gguf.gguf_files.imatrix import Imatrix
    from reap2gguf.models.description import GgufTensor
    from reap2gguf.progress import Progress, Task


@dataclass(frozen=True)
class GgufOutput:
    """One file to write: its final name and its header."""

    path: Path
    header: HeaderFacts


@dataclass(frozen=True)
class _OpenFile:
    file: OutputFile
    layout: GgufLayout
    tensor_types: Mapping[str, GGMLQuantizationType]

    def tell_hash(self, tensors: Sequence[GgufTensor], missing: Collection[str]) -> None:
        """What will not be written: tensors that are there already, and zeros between tensors."""
        if self.file.hashed is None:
            return
        ends = [*sorted(self.layout.offsets.values()), self.layout.n_bytes]
        next_after = dict(pairwise(ends))
        for tensor in tensors:
            first = self.layout.offsets[tensor.name]
            row = row_bytes(self.tensor_types[tensor.name], tensor.n_columns)
            last = first + prod(tensor.shape[:-1]) * row
            if tensor.name not in missing:
                self.file.hashed.wrote(first, last)
            self.file.hashed.wrote(last, next_after[first])

    def place(self, rows: RowRange) -> tuple[int, int]:
        """Where a range begins in the file, and where it ends."""
        tensor = rows.tensor
        row = row_bytes(self.tensor_types[tensor.name], tensor.n_columns)
        first = self.layout.offsets[tensor.name] + rows.first_in_tensor * row
        return first, first + (rows.last - rows.first) * row

    def keep(self, rows: RowRange) -> None:
        """Tell the hash of a range that was written before."""
        if self.file.hashed is not None:
            self.file.hashed.wrote(*self.place(rows))


def export_gguf(
    weights: Weights,
    tensors: Sequence[GgufTensor],
    outputs: Sequence[GgufOutput],
    imatrix: Imatrix | None,
    n_threads: int,
    progress: Progress,
    journal: ExportJournal | None = None,
    hashes: Hashes | None = None,
    device: str = "cpu",
    checked: float = SAMPLE,
) -> None:
    """Write all `outputs` in one pass over the weights; they get their final names together.

    With `hashes`, they are hashed while they are written. With `device` cuda, or auto where much is
    to do, a GPU quantizes. `checked` is the share of kernels' blocks that libggml makes again.

    An export that fails leaves unfinished files if there is a journal to resume from, and none
    otherwise. Raises ArtifactError if the imatrix does not fit, CheckpointError if a stored value
    is not finite, OutputError if the disk is full or fails.
    """
    types_of = made_types(tensors, [output.header.tensor_types for output in outputs])
    check_imatrix(tensors, types_of, imatrix)
    quantizer = load_quantizer(checked)
    layouts = [lay_out(weights.folder, tensors, output.header) for output in outputs]
    resume = _can_resume(journal, tensors, outputs, layouts)
    try:
        with ExitStack() as stack:
            files = [
                stack.enter_context(_opened(output, layout, resume, hashes))
                for output, layout in zip(outputs, layouts, strict=True)
            ]
            total = sum(prod(tensor.shape) for tensor in tensors) * len(outputs)
            task = stack.enter_context(progress.task("Writing GGUF", total, "weights"))
            entries = imatrix.entries if imatrix else {}
            importance = AwaitedImportance(entries, types_of)
            host = BlockMaker(weights, quantizer, entries)
            keys = _to_quantize(types_of, importance)
            made = stack.enter_context(making(host, device, keys, total, n_threads, progress))
            importance.expect_readers(made.n_threads)
            _Job(weights, made, importance, files, task, journal).run_all(tensors)
    except BaseException:
        if journal is None:
            _remove_unfinished(outputs)
        raise
    for output in outputs:
        rename(part_of(output.path), output.path)


def _to_quantize(
    types_of: Mapping[str, set[GGMLQuantizationType]], importance: AwaitedImportance
) -> set[tuple[GGMLQuantizationType, bool]]:
    """Each type that a tensor gets, with whether it is weighted by importance."""
    return {
        (one, importance.is_weighted(name)) for name, types in types_of.items() for one in types
    }


def _remove_unfinished(outputs: Sequence[GgufOutput]) -> None:
    for output in outputs:
        with suppress(OSError):  # the error that is being raised says more
            part_of(output.path).unlink(missing_ok=True)


def _can_resume(
    journal: ExportJournal | None,
    tensors: Sequence[GgufTensor],
    outputs: Sequence[GgufOutput],
    layouts: Sequence[GgufLayout],
) -> bool:
    """Whether all files that the journal is about exist; if not, the journal is cleared."""
    if journal is None or journal.is_empty:
        return False
    is_whole = all(tensor.name in journal for tensor in tensors)
    for output, layout in zip(outputs, layouts, strict=True):
        part = part_of(output.path)
        if not is_own_file(part) and is_whole and _has_size(output.path, layout.n_bytes):
            rename(output.path, part)  # interrupted between two renames
        if not _has_size(part, layout.n_bytes):
            journal.clear()
            return False
    return True


def _has_size(path: Path, n_bytes: int) -> bool:
    return is_own_file(path) and path.stat().st_size == n_bytes


@contextmanager
def _opened(
    output: GgufOutput, layout: GgufLayout, resume: bool, hashes: Hashes | None
) -> Iterator[_OpenFile]:
    """A file of its full length, so that a full disk is found now, with its header written."""
    with open_file(part_of(output.path), output.path, resume) as opened:
        opened.reserve(layout.n_bytes)
        file = opened.hashed_by(hashes, layout.n_bytes)
        file.write_at(layout.header, 0)
        yield _OpenFile(file, layout, output.header.tensor_types)


@dataclass(frozen=True)
class _Job:
    weights: Weights
    making: Making
    importance: AwaitedImportance
    files: Sequence[_OpenFile]
    task: Task
    journal: ExportJournal | None

    def run_all(self, tensors: Sequence[GgufTensor]) -> None:
        """Write every tensor that the journal does not have, and flush the files."""
        journal, importance = self.journal, self.importance
        missing = importance.in_order([one for one in tensors if not self._is_done(one)])
        n_values = sum(prod(tensor.shape) for tensor in tensors)
        self.task.advance((n_values - sum(prod(t.shape) for t in missing)) * len(self.files))
        names = {tensor.name for tensor in missing}
        for file in self.files:
            file.tell_hash(tensors, names)
        outputs = [file.file for file in self.files]
        todo = list(batches(self.weights, missing, self.making.batch_bytes))
        remaining = Counter(batch[0].tensor.name for batch in todo)
        lock = threading.Lock()

        def work(batch: Batch) -> None:
            name = batch[0].tensor.name
            if journal is not None and name in journal and self._is_written(name):
                for file in self.files:
                    for rows in batch:
                        file.keep(rows)
                self.task.advance(sum(rows.n_values for rows in batch) * len(self.files))
            else:
                importance.wait(name)
                self.run(batch)
            with lock:
                remaining[name] -= 1
                is_whole = not remaining[name]
            if is_whole and journal is not None:
                journal.add(name, importance.digest(name), outputs)

        try:
            work_through(work, self.weights, iter(todo), self.making.n_threads, importance.stop)
        except BaseException:
            if journal is not None:
                with suppress(OutputError):  # the error that is being raised says more
                    journal.save(outputs)
            raise
        for output in outputs:
            output.finish()
        if journal is not None:
            journal.save(outputs)

    def _is_done(self, tensor: GgufTensor) -> bool:
        """Whether the files have a tensor, as far as that is known before its importance."""
        if self.journal is None or tensor.name not in self.journal:
            return False
        return self.importance.is_final(tensor.name) and self._is_written(tensor.name)

    def _is_written(self, name: str) -> bool:
        """Whether a tensor of the journal was quantized with this importance; waits for it."""
        assert self.journal is not None
        is_written = self.journal.holds(name, self.importance.digest(name))
        if not is_written:
            self.journal.forget(name)
        return is_written

    def run(self, batch: Batch) -> None:
        """Read a batch of rows and write it, quantized, to every file."""
        name, n_values = batch[0].tensor.name, sum(rows.n_values for rows in batch)
        made = self.making.maker.make(batch, {file.tensor_types[name] for file in self.files})
        for file in self.files:
            flat = made[file.tensor_types[name]].reshape(-1).data
            file.file.write_at(flat, file.place(batch[0])[0])
            self.task.advance(n_values)
