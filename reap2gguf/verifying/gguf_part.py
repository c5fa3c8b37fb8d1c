"""Checks the GGUF folder of a bundle: members, hashes, importance matrix, headers, and values."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from reap2gguf.bundle.layout import IMATRIX_DAT_FILE, IMATRIX_FILE, MANIFEST_FILE, SUMS_FILE
from reap2gguf.bundle.members import check_members, gguf_members
from reap2gguf.bundle.sums import check_sums, folder_bytes
from reap2gguf.files import is_own_file
from reap2gguf.models.side_values import side_files
from reap2gguf.verifying.exactness import EXACT_TYPES, WITHIN_BOUNDS, Exactness
from reap2gguf.verifying.facts import check_gguf_facts, check_side_facts
from reap2gguf.verifying.gguf_file import (
    GgufCheck,
    check_header,
    check_side_file,
    check_tensor_types,
    expected_gguf,
    expected_side,
    open_gguf,
    values_or_error,
)
from reap2gguf.verifying.gguf_layout import check_layout
from reap2gguf.verifying.imatrix_files import (
    check_dat,
    check_entries,
    check_recorded_imatrix,
    open_imatrix,
)
from reap2gguf.verifying.report import Level, ended_by_errors
from reap2gguf.verifying.sliced import compared_blocks, is_sliced_of

if TYPE_CHECKING:
    from reap2gguf.bundle.manifest import GgufRecord, SideRecord
    from reap2gguf.gguf_files.imatrix import Imatrix
    from reap2gguf.gguf_files.reader import GgufHeader
    from reap2gguf.verifying.context import Check, Reference

# types that are made again and compared byte for byte in any case
_ALWAYS_EXACT = frozenset(one.name for one in EXACT_TYPES)


@dataclass
class GgufPart:
    """The GGUF folder of a bundle that is being verified.

    `reference` is the weights that its files were made from, None if they are not there.
    """

    check: Check
    folder: Path
    reference: Reference | None
    is_sound: bool = True  # the manifest; else nothing is made from it again
    _imatrix: Imatrix | None = field(default=None, init=False)
    _opened: dict[Path, tuple[GgufHeader | None, list[str]]] = field(
        default_factory=dict, init=False
    )

    def run(self) -> None:
        """Check everything in the folder, generated texts apart."""
        check = self.check
        check.take(self._check_imatrix(), IMATRIX_FILE)
        self._check_models([record for record in check.manifest.gguf if self._has(record.files)])
        for side in check.manifest.side_files:
            if self._has((side.file,)):
                check.take(self._check_side(side), side.file)

    def _has(self, names: Collection[str]) -> bool:
        """Whether files are there; those that are not have been reported."""
        return all(is_own_file(self.folder / name) for name in names)

    def _check_imatrix(self) -> Iterator[str]:
        """The matrix, read once for all files, and its copy in the older format."""
        if not self._has((IMATRIX_FILE,)):
            return
        imatrix, problems = open_imatrix(self.folder)
        yield from problems
        if imatrix is None:
            return
        self._imatrix = imatrix
        if self._has((IMATRIX_DAT_FILE,)):
            violations = list(check_dat(self.folder, imatrix))
            yield from violations
            if not violations:
                self.check.found.reach(Level.EXACT, [self.folder / IMATRIX_DAT_FILE])
        manifest = self.check.manifest
        first = next((record for record in manifest.gguf if self._has(record.files)), None)
        header = None if first is None else self._open(self.folder / first.first)[0]
        if header is not None:
            shapes = {name: info.shape for name, info in header.tensors.items()}
            yield from check_recorded_imatrix(
                imatrix, manifest.calibration, manifest.pruning, shapes
            )
        if self.reference is not None:
            is_given = manifest.calibration.imatrix_file is not None
            yield from check_entries(imatrix, self.reference[1], is_given)

    def _check_models(self, records: Sequence[GgufRecord]) -> None:
        """The GGUF files of the model: what each header says, then the values of all in a pass."""
        check = self.check
        found: list[list[str]] = []
        files = {record.file: self._gguf_check(record) for record in records}
        for record in records:
            of_header = self._check_header(record, files[record.file])
            found.append(list(ended_by_errors(of_header, record.first)))
        if check.strictness.reads_values:
            for violations, more in zip(found, self._check_values(files, records), strict=True):
                violations += more
        for violations in found:
            check.found.violations += violations

    def _gguf_check(self, record: GgufRecord) -> GgufCheck:
        check = self.check
        expected = expected_gguf(check.manifest, record)
        if not self.is_sound:
            expected = replace(expected, names=None)
        exactness = self._exactness(check.manifest.versions_of(record).get("ggml"))
        if record.adopted:
            exactness = WITHIN_BOUNDS
            if check.strictness.reads_values:
                self._say_adopted(record)
        path = self.folder / record.first
        return GgufCheck(path, expected, exactness, self._open(path)[0])

    def _check_header(self, record: GgufRecord, file: GgufCheck) -> Iterator[str]:
        """What a file's header says, which is read once."""
        check = self.check
        if file.header is not None:
            yield from check_gguf_facts(check.manifest, record, file.header, self._imatrix)
        if check.strictness.reads_values:
            yield from self._open(file.path)[1]
            if file.header is not None:
                yield from file.header_violations(self.reference)
        elif file.header is not None:
            yield from check_header(file.header, file.expected)

    def _check_values(
        self, files: Mapping[str, GgufCheck], records: Sequence[GgufRecord]
    ) -> list[list[str]]:
        """Violations in the values of each file; an error that ends the pass is one of each."""
        check = self.check
        how = self.reference, check.n_threads, check.progress, check.strictness.device
        found = values_or_error(list(files.values()), *how)
        self._check_blocks(records, found)
        for record in records:
            file = files[record.file]
            if file.unreadable:
                check.found.not_checked.append(f"{record.file}: {file.unreadable}")
            else:
                self._reached(self.reference, record.files, file.is_exact)
            if file.differing:
                check.found.not_checked.append(
                    f"{record.file}: {', '.join(file.differing)} within bounds: not byte for byte "
                    "what this machine makes, as --exact shows"
                )
        return found

    def _check_blocks(self, records: Sequence[GgufRecord], found: list[list[str]]) -> None:
        """Files that were sliced out of a GGUF file, byte for byte, where that is given."""
        for record, violations in zip(records, found, strict=True):
            path = self.folder / record.first
            # what a recipe made was quantized again, even if the source's names the same one
            if not record.adopted or not is_sliced_of(self.reference, self._open(path)[0]):
                continue
            assert self.reference is not None
            of_blocks = list(compared_blocks(path, self.reference[0], self.check.progress))
            violations += of_blocks
            if not of_blocks:
                names = [self.folder / name for name in record.files]
                self.check.found.reach(Level.EXACT, names)

    def _check_side(self, side: SideRecord) -> Iterator[str]:
        """A side file, such as a vision projector: what its header says, then its values."""
        check, path = self.check, self.folder / side.file
        expected = expected_side(check.manifest, side)
        if not self.is_sound:
            expected = replace(expected, names=None)
        header, _ = self._open(path)
        if header is not None:
            yield from check_side_facts(check.manifest, side, header)
        if not check.strictness.reads_values:
            if header is not None and expected.tensor_types is not None:
                yield from check_layout(header)
                yield from check_tensor_types(header, expected.tensor_types)
            return
        source = None
        if self.reference is not None:
            weights, model = self.reference
            sides = side_files(model, weights)
            source = (weights, model, sides) if sides else None
        exactness = replace(self._exactness(check.manifest.program.get("ggml")), imatrix=None)
        how = check.n_threads, check.progress, exactness  # no imatrix is used for them
        yield from check_side_file(path, expected, source, *how, header)
        is_exact = exactness.every_type or _ALWAYS_EXACT.issuperset(side.tensors.values())
        self._reached(source, (side.file,), is_exact)

    def _exactness(self, ggml: str | None) -> Exactness:
        """How to compare a file that was quantized by that libggml."""
        return Exactness(self.check.strictness.is_exact, self._imatrix, ggml)

    def _say_adopted(self, record: GgufRecord) -> None:
        """An adopted file's own importance matrix, if it had one, is not known."""
        if self.check.strictness.is_exact:
            self.check.found.not_checked.append(
                f"{record.file} not quantized again: another program made it"
            )

    def _reached(
        self, compared_with: object | None, names: Collection[str], is_exact: bool
    ) -> None:
        """Note how strictly the tensors of a file were compared."""
        if compared_with is not None:
            level = Level.EXACT if is_exact else Level.VALUES
            self.check.found.reach(level, (self.folder / name for name in names))

    def _open(self, path: Path) -> tuple[GgufHeader | None, list[str]]:
        """The header of a file, read once, or the violation."""
        if path not in self._opened:
            self._opened[path] = open_gguf(path)
        return self._opened[path]


def check_gguf_files(check: Check, folder: Path) -> Iterator[str]:
    """Violations in the names and hashes of the folder's files."""
    members = gguf_members(check.manifest)
    absent = {name for name in members if not os.path.lexists(folder / name)}
    for name in sorted(absent - {SUMS_FILE}):
        yield f"{folder.name}: {name} is missing"
    yield from check_members(folder, members)
    title = f"Verifying hashes of {folder.name}"
    with check.progress.task(title, folder_bytes(folder), "bytes") as task:
        yield from check_sums(folder, members, check.n_threads, absent, task.advance)
    hashed = members - absent - {MANIFEST_FILE, SUMS_FILE}
    check.found.reach(Level.HASHES, (folder / name for name in hashed))
