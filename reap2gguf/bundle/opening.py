"""Opens a finished bundle from either of its two folders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from reap2gguf.bundle.layout import GGUF_SUFFIX, MANIFEST_FILE, BundleFolders, folders_of
from reap2gguf.bundle.manifest import Manifest
from reap2gguf.errors import UsageError, VerificationError
from reap2gguf.files import is_plain


@dataclass(frozen=True)
class OpenBundle:
    """A finished bundle: its folders, the manifest of both, and when each file was last written."""

    folders: BundleFolders
    manifest: Manifest
    changed_ns: Mapping[Path, int] = field(default_factory=dict)

    @property
    def hf(self) -> Path | None:
        """The safetensors folder; None if nothing was pruned: the source's are not copied."""
        return None if self.manifest.hf is None else self.folders.hf

    @property
    def gguf(self) -> Path:
        """The GGUF folder."""
        return self.folders.gguf

    def check_unchanged(self) -> None:
        """Raises VerificationError if a file was written after the bundle was opened."""
        violations = [
            f"{path}: changed while it was read"
            for path, stamp in self.changed_ns.items()
            if not is_plain(path) or path.stat().st_mtime_ns != stamp
        ]
        if violations:
            advice = "nothing was uploaded; run the same command again when no program writes there"
            raise VerificationError(violations, advice)


def open_bundle(path: Path) -> OpenBundle:
    """The bundle that has `path` as one of its two folders.

    Raises UsageError if `path` is not a bundle, the other folder is missing, or the two folders
    are from different builds; ArtifactError if the manifest is broken.
    """
    if not is_plain(path / MANIFEST_FILE):
        raise UsageError(
            f"{path}: not a bundle: it holds no {MANIFEST_FILE}; pass a folder that `build` made, "
            f"NAME or NAME{GGUF_SUFFIX}"
        )
    folder = path.resolve()
    manifest = Manifest.load(folder)
    folders = folders_of(folder, None if manifest.hf is None else manifest.hf.folder)
    if folders is None:
        raise UsageError(
            f"{path}: a GGUF folder whose name does not end in {GGUF_SUFFIX}; rename it"
        )
    places = [folders.gguf] if manifest.hf is None else [folders.hf, folders.gguf]
    for place in places:
        if not place.is_dir():
            raise UsageError(f"{place}: missing; both folders of a bundle are published together")
        if place != folder and Manifest.load(place) != manifest:
            raise UsageError(
                f"{folders.hf} and {folders.gguf}: {MANIFEST_FILE} differs, so they are from "
                "different builds; build the bundle again"
            )
    files = (file for place in places for file in place.iterdir() if file.is_file())
    stamps = {file: file.stat().st_mtime_ns for file in files}
    return OpenBundle(folders, manifest, stamps)
