"""Verifies a finished bundle from its own files alone."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from reap2gguf.bundle.layout import MANIFEST_FILE, is_hf_folder
from reap2gguf.bundle.manifest import Manifest, SideRecord
from reap2gguf.bundle.opening import OpenBundle
from reap2gguf.bundle.sums import check_hf_hashes, check_sums, folder_bytes
from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.errors import (
    ArtifactError,
    DependencyError,
    Reap2ggufError,
    UsageError,
    VerificationError,
)
from reap2gguf.files import is_plain
from reap2gguf.gguf_files.split import first_parts
from reap2gguf.models.contract import MoeModel
from reap2gguf.models.side_values import side_files
from reap2gguf.verifying.gguf_file import (
    ExpectedGguf,
    check_experts,
    check_gguf,
    check_gguf_header,
    check_side_file,
    expected_gguf,
    types_by_tensor,
)
from reap2gguf.verifying.hf_folder import check_folder, open_folder

if TYPE_CHECKING:
    from reap2gguf.bundle.opening import OpenBundle
    from reap2gguf.progress import Progress

_Opened = tuple[Checkpoint, MoeModel]


@dataclass(frozen=True)
class VerifyReport:
    """The result of a verification."""

    checked: tuple[str, ...]  # names of folders and files
    violations: tuple[str, ...]


def verify_paths(paths: Sequence[Path], n_threads: int, progress: Progress) -> VerifyReport:
    """Verify a bundle folder, or a safetensors folder with GGUF files made from it.

    Raises UsageError if the paths are neither.
    """
    # os.path returns False where Path raises, for example for a name that is too long
    folders = [path for path in paths if os.path.isdir(path)]
    files = [path for path in paths if not os.path.isdir(path)]
    if missing := [path for path in files if not os.path.exists(path)]:
        raise UsageError(f"{missing[0]}: no such file or folder")
    if files and len(folders) == 1:
        return verify_pair(folders[0], files, n_threads, progress)
    if files or not folders:
        raise UsageError("pass a bundle folder, or a safetensors folder and its GGUF files")
    checked: list[str] = []
    violations: list[str] = []
    for folder in folders:
        is_bundle = (folder / MANIFEST_FILE).is_file() or any(folder.glob("*.gguf"))
        if not is_bundle and not (folder / "config.json").is_file():
            raise UsageError(f"{folder}: neither a bundle nor a safetensors folder")
        if not is_bundle:
            report = verify_pair(folder, [], n_threads, progress)
        else:
            report = verify_bundle(folder, n_threads, progress)
        checked += report.checked
        violations += report.violations
    return VerifyReport(tuple(dict.fromkeys(checked)), tuple(violations))


def verify_pair(
    folder: Path, files: Sequence[Path], n_threads: int, progress: Progress
) -> VerifyReport:
    """Verify a safetensors folder, and GGUF files that must hold the same values."""
    with _open(folder) as (opened, violations):
        n_experts = None
        if opened is not None:
            n_experts = opened[1].facts.n_experts
            found = check_folder(*opened, progress)
            violations += _with_error(found, folder.name)
        expected = ExpectedGguf(None, n_experts)
        for path in first_parts(files):
            if opened is None:
                violations += check_gguf_header(path, expected)
            else:
                found = check_gguf(path, expected, opened, n_threads, progress)
                violations += _with_error(found, path.name)
    return VerifyReport((folder.name, *(path.name for path in files)), tuple(violations))


@contextmanager
def _open(folder: Path, n_experts: int | None = None) -> Iterator[tuple[_Opened | None, list[str]]]:
    """A safetensors folder with its model, None if it cannot be read; and the violations."""
    checkpoint, model, violations = open_folder(folder, n_experts)
    if checkpoint is None:
        yield None, violations
        return
    with checkpoint:
        yield None if model is None else (checkpoint, model), violations


def _with_error(violations: Iterator[str], where: str) -> Iterator[str]:
    """Violations; an error that ends a check early becomes the last one."""
    try:
        yield from violations
    except DependencyError:
        raise
    except Reap2ggufError as error:
        yield f"{where}: {error}"


def verify_bundle(folder: Path, n_threads: int, progress: Progress) -> VerifyReport:
    """Verify a folder that `build` made; for a GGUF folder, also the safetensors beside it."""
    try:
        manifest = Manifest.load(folder)
    except ArtifactError as error:
        return VerifyReport((folder.name,), (str(error),))
    if is_hf_folder(folder, manifest.hf.folder):
        found = _with_error(_check_hf(folder, manifest, n_threads, progress), folder.name)
        return VerifyReport((folder.name,), tuple(found))
    named = {name for record in manifest.gguf for name in record.files}
    named |= {side.file for side in manifest.side_files}
    absent = {name for name in named if not is_plain(folder / name)}
    violations = [f"{folder.name}: {name} is missing" for name in sorted(absent)]
    with progress.task(f"Verifying hashes of {folder.name}", folder_bytes(folder), "bytes") as task:
        violations += check_sums(folder, n_threads, absent, task.advance)
    checked = [folder.name]
    hf_folder = folder.resolve().parent / manifest.hf.folder
    if hf_folder.is_dir():
        checked.append(hf_folder.name)
        found = _check_hf(hf_folder, manifest, n_threads, progress)
        violations += _with_error(found, hf_folder.name)
    with _open(hf_folder) as (opened, _):
        for record in manifest.gguf:
            if not absent & set(record.files):
                expected = expected_gguf(record, manifest.pruning.n_kept)
                path = folder / record.first
                found = check_gguf(path, expected, opened, n_threads, progress)
                violations += _with_error(found, record.first)
        for side in manifest.side_files:
            if side.file not in absent:
                found = _check_side(folder / side.file, side, opened, n_threads, progress)
                violations += _with_error(found, side.file)
    return VerifyReport(tuple(checked), tuple(violations))


def _check_hf(
    folder: Path, manifest: Manifest, n_threads: int, progress: Progress
) -> Iterator[str]:
    """Violations of a bundle's safetensors folder: manifest, hashes, config, shards, values."""
    try:
        same = Manifest.load(folder) == manifest
    except ArtifactError as error:
        yield str(error)
    else:
        if not same:
            yield f"{folder.name}: {MANIFEST_FILE} differs from that of the GGUF folder"
    with progress.task(f"Verifying hashes of {folder.name}", folder_bytes(folder), "bytes") as task:
        yield from check_hf_hashes(folder, manifest, n_threads, task.advance)
    with _open(folder, manifest.pruning.n_kept) as (opened, violations):
        yield from violations
        if opened is not None:
            yield from check_folder(*opened, progress)


def _check_side(
    path: Path, record: SideRecord, opened: _Opened | None, n_threads: int, progress: Progress
) -> Iterator[str]:
    """Violations of a side file against its record, and against the safetensors if given."""
    source = None
    if opened is not None:
        checkpoint, model = opened
        try:
            sides = side_files(model, checkpoint)
        except Reap2ggufError as error:
            yield f"{checkpoint.folder.name}: {error}"
        else:
            source = (checkpoint, sides) if sides else None
    yield from check_side_file(path, types_by_tensor(record.tensors), source, n_threads, progress)


def check_bundle(bundle: OpenBundle, n_threads: int, progress: Progress) -> None:
    """Check before a push that every file is as built and each model has all its experts.

    This reads hashes and headers, not values: the build has compared those. Raises
    VerificationError with all violations.
    """
    total = folder_bytes(bundle.hf, bundle.gguf)
    with progress.task("Checking hashes", total, "bytes") as task:
        violations = list(check_hf_hashes(bundle.hf, bundle.manifest, n_threads, task.advance))
        violations += check_sums(bundle.gguf, n_threads, advance=task.advance)
    n_kept = bundle.manifest.pruning.n_kept
    with _open(bundle.hf, n_kept) as (_, found):
        violations += found
    for record in bundle.manifest.gguf:
        violations += check_experts(bundle.gguf, record, n_kept)
    if violations:
        raise VerificationError(violations, "nothing was uploaded; build the bundle again")
