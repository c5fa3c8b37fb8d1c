"""Checks a finished bundle from nothing but its own files."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from gguf import GGMLQuantizationType

from reap2gguf.bundle.manifest import (
    MANIFEST_FILE,
    GgufRecord,
    Manifest,
    SideRecord,
)
from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.errors import ArtifactError, DependencyError, Reap2ggufError, UsageError
from reap2gguf.files import is_plain
from reap2gguf.gguf_files.gguf_split import first_parts
from reap2gguf.models import MoeModel, SideFile
from reap2gguf.progress import Progress
from reap2gguf.verifying.gguf_file import (
    ExpectedGguf,
    check_header,
    check_tensor_types,
    check_values,
    compare_model,
    compare_tensors,
    open_gguf,
)
from reap2gguf.verifying.hashes import check_hf_hashes, check_sums, folder_bytes
from reap2gguf.verifying.hf_folder import check_folder, open_folder


@dataclass(frozen=True)
class VerifyReport:
    """The outcome of a verification."""

    checked: tuple[str, ...]  # what was looked at
    violations: tuple[str, ...]


def verify_paths(paths: Sequence[Path], n_threads: int, progress: Progress) -> VerifyReport:
    """Verify a bundle folder, or a safetensors folder with GGUF files made from it.

    Raises UsageError if the paths are neither.
    """
    # os.path answers False where Path raises, as for a name that is too long
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
        bundled = (folder / MANIFEST_FILE).is_file() or any(folder.glob("*.gguf"))
        if not bundled and not (folder / "config.json").is_file():
            raise UsageError(f"{folder}: neither a bundle nor a safetensors folder")
        if not bundled:
            report = verify_pair(folder, [], n_threads, progress)
        else:
            report = verify_bundle(folder, n_threads, progress)
        checked += report.checked
        violations += report.violations
    return VerifyReport(tuple(checked), tuple(violations))


def verify_pair(
    folder: Path, files: Sequence[Path], n_threads: int, progress: Progress
) -> VerifyReport:
    """A safetensors folder, and GGUF files that must hold its values."""
    checkpoint, model, violations = open_folder(folder)
    if checkpoint is not None and model is not None:
        found = check_folder(checkpoint, model, progress)
        violations += _told(found, folder.name)
    for path in first_parts(files):
        header, problems = open_gguf(path)
        violations += problems
        if header is not None:
            n_experts = model.facts.n_experts if model else None
            violations += check_header(header, ExpectedGguf(None, n_experts))
            if checkpoint is not None and model is not None:
                found = compare_model(header, checkpoint, model, n_threads, progress)
                violations += _told(found, path.name)
    return VerifyReport((folder.name, *(path.name for path in files)), tuple(violations))


def _told(violations: Iterator[str], where: str) -> Iterator[str]:
    """Violations; an error that ends the check is one more, for a broken file is what is sought."""
    try:
        yield from violations
    except DependencyError:
        raise
    except Reap2ggufError as error:
        yield f"{where}: {error}"


def verify_bundle(folder: Path, n_threads: int, progress: Progress) -> VerifyReport:
    """A folder that `build` left: GGUF files, or safetensors; its sibling too where it is there."""
    try:
        manifest = Manifest.load(folder)
    except ArtifactError as error:
        return VerifyReport((folder.name,), (str(error),))
    if is_hf_folder(folder, manifest):
        found = _told(_check_hf(folder, manifest, n_threads, progress), folder.name)
        return VerifyReport((folder.name,), tuple(found))
    named = {name for record in manifest.gguf for name in record.files}
    named |= {side.file for side in manifest.side_files}
    absent = {name for name in named if not is_plain(folder / name)}
    violations = [f"{folder.name}: {name} is missing" for name in sorted(absent)]
    with progress.task(f"Verifying hashes of {folder.name}", folder_bytes(folder), "bytes") as task:
        violations += check_sums(folder, n_threads, absent, task.advance)
    hf_folder = folder.resolve().parent / manifest.hf.folder
    checked = [folder.name]
    if hf_folder.is_dir():
        checked.append(hf_folder.name)
        found = _check_hf(hf_folder, manifest, n_threads, progress)
        violations += _told(found, hf_folder.name)
    for record in manifest.gguf:
        if absent & set(record.files):
            continue
        path = folder / record.first
        found = _check_gguf(path, record, manifest, hf_folder, n_threads, progress)
        violations += _told(found, record.first)
    for side in manifest.side_files:
        if side.file in absent:
            continue
        found = _check_side(folder / side.file, side, hf_folder, n_threads, progress)
        violations += _told(found, side.file)
    return VerifyReport(tuple(checked), tuple(violations))


def is_hf_folder(folder: Path, manifest: Manifest) -> bool:
    """Whether a bundle's folder is that of the safetensors, by its name or what it holds.

    A download lies under any name: the Hub's cache calls it after the commit.
    """
    by_name = folder.resolve().name == manifest.hf.folder
    return by_name or (is_plain(folder / "config.json") and not any(folder.glob("*.gguf")))


def _check_side(
    path: Path, record: SideRecord, hf_folder: Path, n_threads: int, progress: Progress
) -> Iterator[str]:
    """A side file against its record, and against the safetensors where they are there."""
    header, problems = open_gguf(path)
    yield from problems
    if header is None:
        return
    tensor_types = {
        name: GGMLQuantizationType[tensor_type] for name, tensor_type in record.tensors.items()
    }
    yield from check_tensor_types(header, tensor_types)
    checkpoint, model = _open_sibling(hf_folder)
    sides: tuple[SideFile, ...] = ()
    if checkpoint is not None and model is not None:
        try:
            sides = model.side_files(hf_folder, checkpoint.tensors)
        except Reap2ggufError as error:
            yield f"{hf_folder.name}: {error}"
    if checkpoint is None or not sides:
        yield from check_values(header, n_threads, progress)
    for side in sides:
        if checkpoint is not None and side.general_type == header.metadata.get("general.type"):
            yield from compare_tensors(header, checkpoint, side.tensors, n_threads, progress)


def _open_sibling(hf_folder: Path) -> tuple[Checkpoint | None, MoeModel | None]:
    """The safetensors beside a bundle, if they are there and sound."""
    if not hf_folder.is_dir():
        return None, None
    checkpoint, model, _ = open_folder(hf_folder)
    return checkpoint, model


def _check_hf(
    folder: Path, manifest: Manifest, n_threads: int, progress: Progress
) -> Iterator[str]:
    try:
        same = Manifest.load(folder) == manifest
    except ArtifactError as error:
        yield str(error)
    else:
        if not same:
            yield f"{folder.name}: {MANIFEST_FILE} is not that of the GGUF bundle"
    with progress.task(f"Verifying hashes of {folder.name}", folder_bytes(folder), "bytes") as task:
        yield from check_hf_hashes(folder, manifest, n_threads, task.advance)
    checkpoint, model, violations = open_folder(folder, manifest.pruning.n_kept)
    yield from violations
    if checkpoint is not None and model is not None:
        yield from check_folder(checkpoint, model, progress)


def _check_gguf(
    path: Path,
    record: GgufRecord,
    manifest: Manifest,
    hf_folder: Path,
    n_threads: int,
    progress: Progress,
) -> Iterator[str]:
    header, problems = open_gguf(path)
    yield from problems
    if header is None:
        return
    tensor_types = {
        name: GGMLQuantizationType[tensor_type] for name, tensor_type in record.tensors.items()
    }
    yield from check_header(header, ExpectedGguf(tensor_types, manifest.pruning.n_kept))
    checkpoint, model = _open_sibling(hf_folder)
    if checkpoint is not None and model is not None:
        yield from compare_model(header, checkpoint, model, n_threads, progress)
    else:
        yield from check_values(header, n_threads, progress)
