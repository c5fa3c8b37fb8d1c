"""The files of a finished bundle, before something is added to it: are they what was verified?"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from reap2gguf.bundle.layout import SUMS_FILE
from reap2gguf.bundle.manifest import FileRecord, Manifest
from reap2gguf.bundle.members import check_members, gguf_members, hf_members
from reap2gguf.bundle.sums import check_hf_hashes, check_sums, folder_bytes, read_sums
from reap2gguf.errors import VerificationError

if TYPE_CHECKING:
    from reap2gguf.building.workdir import Workdir
    from reap2gguf.bundle.manifest import GgufRecord
    from reap2gguf.progress import Progress

_ADVICE = "nothing was added or changed; `reap2gguf verify` checks the whole bundle"


@dataclass(frozen=True)
class BundleFiles:
    """The files of both folders that are there before cards and hashes, by name."""

    hf: dict[str, FileRecord]
    gguf: dict[str, FileRecord]


def check_bundle_files(
    work: Workdir,
    manifest: Manifest,
    stay: Sequence[GgufRecord],
    adopted: Sequence[Path],
    n_threads: int,
    progress: Progress,
) -> None:
    """Refuse a bundle that holds other files, or other bytes, than were verified.

    A file with the size and the time of change that the build left is taken for the same; others
    are hashed. `stay` are the models' files that have to be there; `adopted` are files that may be
    in the GGUF folder though no record names them.
    Raises VerificationError.
    """
    hf, gguf = work.final_hf, work.final_gguf
    own = {path.name for path in adopted if os.path.realpath(path.parent) == os.path.realpath(gguf)}
    wanted, known = gguf_members(replace(manifest, gguf=tuple(stay))), gguf_members(manifest)
    violations = list(check_members(gguf, known | own))
    if manifest.hf is not None:
        violations += check_members(hf, hf_members(manifest))
    changed = _changed(work, manifest, wanted)
    recorded = {} if manifest.hf is None else manifest.hf.files
    files = {name: one for name, one in recorded.items() if f"{hf.name}/{name}" in changed}
    unread = {name for name in known if f"{gguf.name}/{name}" not in changed}
    if changed and not violations:
        title = f"Verifying hashes of {work.name}"
        folders = (gguf,) if manifest.hf is None else (hf, gguf)
        with progress.task(title, folder_bytes(*folders), "bytes") as task:
            if manifest.hf is not None:
                partial = replace(manifest, hf=replace(manifest.hf, files=files))
                violations += check_hf_hashes(hf, partial, n_threads, task.advance)
            violations += check_sums(gguf, known, n_threads, unread, task.advance)
    if violations:
        raise VerificationError(violations, _ADVICE)


def is_changed(work: Workdir, manifest: Manifest) -> bool:
    """Whether any file of the bundle is not as the last build or addition left it."""
    there = {name for name in gguf_members(manifest) if (work.final_gguf / name).is_file()}
    return bool(_changed(work, manifest, there))


def _changed(work: Workdir, manifest: Manifest, wanted: Collection[str]) -> set[str]:
    """The files that are not as the build left them, by path below the output."""
    names = [f"{work.final_hf.name}/{name}" for name in (manifest.hf.files if manifest.hf else ())]
    names += [f"{work.final_gguf.name}/{name}" for name in wanted]
    finished = work.finished()
    return set(names) if finished is None else set(finished.changed(work.output, names))


def recorded_files(work: Workdir, manifest: Manifest) -> BundleFiles:
    """The files of both folders with the hashes that the bundle records."""
    sums, _ = read_sums(work.final_gguf)
    gguf = {
        name: FileRecord((work.final_gguf / name).stat().st_size, sha256)
        for name, sha256 in sums.items()
        if name != SUMS_FILE and (work.final_gguf / name).is_file()
    }
    return BundleFiles({} if manifest.hf is None else dict(manifest.hf.files), gguf)
