"""Writes a GGUF file with fewer experts: blocks are copied from the source, and none is changed.

A source in several parts gives as many parts, each with the tensors of its own. With the journal
beside the output, tensors that are on the disk already are not written again. Files get their names
together, after they were compared with the source. Memory: the headers, and 4 MiB or one row.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from reap2gguf.atomic import OutputFile, open_file, part_of, remove, rename
from reap2gguf.errors import ArtifactError, OutputError, VerificationError
from reap2gguf.exporting.journal import ExportJournal
from reap2gguf.files import is_own_file
from reap2gguf.gguf_files.part_names import part_name
from reap2gguf.gguf_files.writer import padded
from reap2gguf.gguf_source.checking import violations_in
from reap2gguf.gguf_source.header import PartHead, changes_of, part_head
from reap2gguf.gguf_source.slices import Slice, n_slice_bytes, slices_of

if TYPE_CHECKING:
    from reap2gguf.disk.hashing import Hashes
    from reap2gguf.gguf_files.reader import GgufHeader
    from reap2gguf.gguf_source.checkpoint import GgufCheckpoint
    from reap2gguf.models.description import HeaderValue
    from reap2gguf.progress import Progress, Task
    from reap2gguf.pruning.view import PrunedView

_FORMAT = "1"  # of the journal's key


@dataclass(frozen=True)
class PlannedFile:
    """One file to write: its name, the source's file, and its beginning."""

    path: Path
    source: GgufHeader
    start: PartHead


@dataclass(frozen=True)
class PrunedGguf:
    """A pruned GGUF file, or all its parts, before it is written."""

    files: tuple[PlannedFile, ...]
    slices: Mapping[str, Slice]

    @property
    def n_bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.start.n_bytes for file in self.files)

    @property
    def first(self) -> Path:
        """The file, or the first part."""
        return self.files[0].path


def planned(
    checkpoint: GgufCheckpoint,
    view: PrunedView,
    output: Path,
    name: str,
    own: Sequence[HeaderValue],
) -> PrunedGguf:
    """What `output` will hold: the experts of `view`, under the name `name`.

    `own` are the keys of this program. A source in parts makes parts, called
    OUTPUT-00001-of-00003.gguf and so on. Raises UnsupportedModelError if it cannot be sliced.
    """
    header = checkpoint.gguf
    slices = slices_of(checkpoint, view)
    before = checkpoint.decoded.model
    changes = changes_of(header, before, view.model, slices, name, own)
    parts = header.headers
    files = [
        PlannedFile(path, part, part_head(part, changes, slices, part is parts[0]))
        for path, part in zip(part_paths(output, len(parts)), parts, strict=True)
    ]
    return PrunedGguf(tuple(files), slices)


def part_paths(output: Path, n_parts: int) -> list[Path]:
    """The files of an output: OUTPUT-00001-of-00003.gguf and so on, or itself if it is one."""
    if n_parts == 1:
        return [output]
    stem = output.name.removesuffix(output.suffix)
    return [output.with_name(part_name(stem, number, n_parts)) for number in range(n_parts)]


def is_being_named(pruned: PrunedGguf, fingerprint: str, output: Path) -> bool:
    """Whether the same call was interrupted while its files, all written, got their names."""
    journal = ExportJournal(journal_path(output), _key(pruned, fingerprint))
    return all(name in journal for name in pruned.slices) and all(
        os.path.lexists(file.path) != os.path.lexists(part_of(file.path)) for file in pruned.files
    )


def journal_path(output: Path) -> Path:
    """Where the progress of writing an output is kept."""
    return output.with_name(f"{output.name}.journal")


def write_pruned_gguf(
    pruned: PrunedGguf,
    fingerprint: str,
    output: Path,
    progress: Progress,
    hashes: Hashes | None = None,
    compares: bool = True,
) -> None:
    """Write all files, and with `compares` compare them with the source; then they get names.

    `fingerprint` is the source's. With `hashes`, files are hashed while they are written. An
    interrupted call leaves unfinished files, and a journal by which the next one resumes. Raises
    OutputError if the disk refuses, ArtifactError if the source cannot be read, and
    VerificationError, after which nothing is left, if what was written is not what was planned.
    """
    journal = ExportJournal(journal_path(output), _key(pruned, fingerprint))
    resume = _can_resume(journal, pruned)
    _copy(pruned, journal, resume, progress, hashes)
    checked = violations_in(pruned.slices, _made(pruned), progress) if compares else ()
    if violations := list(checked):
        for file in pruned.files:
            remove(part_of(file.path))
        remove(journal_path(output))
        raise VerificationError(violations)
    for file in pruned.files:
        rename(part_of(file.path), file.path)
    remove(journal_path(output))


def _made(pruned: PrunedGguf) -> list[tuple[Path, GgufHeader, PartHead]]:
    """What is compared: each file before it has its name, the source's, and how it must begin."""
    return [(part_of(file.path), file.source, file.start) for file in pruned.files]


def _key(pruned: PrunedGguf, fingerprint: str) -> str:
    digest = hashlib.sha256(f"{_FORMAT} {fingerprint}\n".encode())
    for file in pruned.files:
        digest.update(file.start.head)
    return digest.hexdigest()


def _can_resume(journal: ExportJournal, pruned: PrunedGguf) -> bool:
    """Whether all files of the journal exist; if not, it is cleared."""
    if journal.is_empty:
        return False
    is_whole = all(name in journal for name in pruned.slices)
    for file in pruned.files:
        part, n_bytes = part_of(file.path), file.start.n_bytes
        if is_whole and not is_own_file(part) and _has_size(file.path, n_bytes):
            rename(file.path, part)  # interrupted between two renames
        if not _has_size(part, n_bytes):
            journal.clear()
            return False
    return True


def _has_size(path: Path, n_bytes: int) -> bool:
    return is_own_file(path) and path.stat().st_size == n_bytes


def _copy(
    pruned: PrunedGguf,
    journal: ExportJournal,
    resume: bool,
    progress: Progress,
    hashes: Hashes | None,
) -> None:
    with ExitStack() as stack:
        files = [stack.enter_context(_opened(file, resume, hashes)) for file in pruned.files]
        total = n_slice_bytes(pruned.slices)
        task = stack.enter_context(progress.task("Copying blocks", total, "bytes"))
        try:
            for plan, file in zip(pruned.files, files, strict=True):
                for name in plan.start.offsets:
                    _copy_tensor(plan, pruned.slices[name], file, journal, task)
                    journal.add(name, "", files)
        except BaseException:
            with suppress(OutputError):  # the error that is being raised says more
                journal.save(files)
            raise
        for file in files:
            file.finish()
        journal.save(files)


@contextmanager
def _opened(file: PlannedFile, resume: bool, hashes: Hashes | None) -> Iterator[OutputFile]:
    """A file of its full length, so that a full disk is found now, with its header written."""
    with open_file(part_of(file.path), file.path, resume) as opened:
        opened.reserve(file.start.n_bytes)
        hashed = opened.hashed_by(hashes, file.start.n_bytes)
        hashed.write_at(file.start.head, 0)
        yield hashed


def _copy_tensor(
    plan: PlannedFile, one: Slice, file: OutputFile, journal: ExportJournal, task: Task
) -> None:
    """The blocks that stay of one tensor, and zeros up to the next one."""
    name = one.info.name
    begin = position = plan.start.offsets[name]
    end = begin + padded(one.n_bytes, plan.source.alignment)
    if name in journal:
        if file.hashed is not None:
            file.hashed.wrote(begin, end)
        task.advance(one.n_bytes)
        return
    for block in one.blocks(plan.source):
        file.write_at(block.data, position)
        position += block.nbytes
        task.advance(block.nbytes)
    if position != begin + one.n_bytes:
        raise ArtifactError(
            f"{plan.source.path}: tensor {name!r} gave {position - begin:,} bytes, expected "
            f"{one.n_bytes:,}"
        )
    file.write_at(bytes(end - position), position)
