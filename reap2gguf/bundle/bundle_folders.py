"""The two folders of a finished bundle, found from either, and checked before publication."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from gguf import GGMLQuantizationType

from reap2gguf.bundle.manifest import MANIFEST_FILE, GgufRecord, Manifest
from reap2gguf.errors import UsageError, VerificationError
from reap2gguf.files import is_plain
from reap2gguf.progress import Progress
from reap2gguf.verifying.bundle import is_hf_folder
from reap2gguf.verifying.gguf_file import ExpectedGguf, check_header, open_gguf
from reap2gguf.verifying.hashes import check_hf_hashes, check_sums, folder_bytes
from reap2gguf.verifying.hf_folder import open_folder

_SUFFIX = "-GGUF"


@dataclass(frozen=True)
class BundleFolders:
    """A bundle: safetensors, GGUF, and the manifest of both."""

    hf: Path
    gguf: Path
    manifest: Manifest
    changed_ns: Mapping[Path, int] = field(default_factory=dict)  # when, before any was read

    def check_unchanged(self) -> None:
        """VerificationError if a file was written after the bundle was opened."""
        violations = [
            f"{path}: changed while it was read"
            for path, stamp in self.changed_ns.items()
            if not is_plain(path) or path.stat().st_mtime_ns != stamp
        ]
        if violations:
            advice = "nothing was uploaded; run the same command again when nothing writes there"
            raise VerificationError(violations, advice)


def open_bundle(path: Path) -> BundleFolders:
    """Both folders of the bundle that `path` is one of.

    Raises UsageError if it is none, its other folder is missing, or they are of two builds;
    ArtifactError if the manifest is broken.
    """
    if not is_plain(path / MANIFEST_FILE):
        raise UsageError(
            f"{path}: no bundle: it holds no {MANIFEST_FILE}; pass the folder NAME or NAME-GGUF "
            "that `build` left"
        )
    folder = path.resolve()
    manifest = Manifest.load(folder)
    if is_hf_folder(folder, manifest):
        hf, gguf = folder, folder.with_name(folder.name + _SUFFIX)
    elif folder.name.endswith(_SUFFIX):
        hf, gguf = folder.with_name(folder.name.removesuffix(_SUFFIX)), folder
    else:
        raise UsageError(f"{path}: a GGUF folder whose name does not end in {_SUFFIX}; rename it")
    other = gguf if folder == hf else hf
    if not other.is_dir():
        raise UsageError(f"{other}: missing; both folders of a bundle are published together")
    if Manifest.load(other) != manifest:
        raise UsageError(
            f"{hf} and {gguf}: are of two builds, as their {MANIFEST_FILE} say; build both again"
        )
    files = (file for place in (hf, gguf) for file in place.iterdir() if file.is_file())
    stamps = {file: file.stat().st_mtime_ns for file in files}
    return BundleFolders(hf, gguf, manifest, stamps)


def check_bundle(bundle: BundleFolders, n_threads: int, progress: Progress) -> None:
    """See that every file is the one that was built, and that each model has its experts.

    Hashes and headers are read, not the values: those were compared when the bundle was built.
    Raises VerificationError with everything that is wrong.
    """
    total = folder_bytes(bundle.hf, bundle.gguf)
    with progress.task("Checking hashes", total, "bytes") as task:
        violations = list(check_hf_hashes(bundle.hf, bundle.manifest, n_threads, task.advance))
        violations += check_sums(bundle.gguf, n_threads, advance=task.advance)
    violations += open_folder(bundle.hf, bundle.manifest.pruning.n_kept)[2]
    for record in bundle.manifest.gguf:
        violations += check_experts(bundle.gguf, record, bundle.manifest.pruning.n_kept)
    if violations:
        raise VerificationError(violations, "nothing was uploaded; build the bundle again")


def check_experts(folder: Path, record: GgufRecord, n_kept: int) -> list[str]:
    """Violations in a GGUF file's header, or in those of its parts together.

    Every tensor of the record must be there once and be of its type, and the experts and router
    rows of every layer must be `n_kept`.
    """
    absent = [name for name in record.files if not is_plain(folder / name)]
    if absent:
        return [f"{folder.name}: {name} is missing" for name in absent]
    header, problems = open_gguf(folder / record.first)
    if header is None:
        return problems
    tensor_types = {name: GGMLQuantizationType[one] for name, one in record.tensors.items()}
    return list(check_header(header, ExpectedGguf(tensor_types, n_kept)))
