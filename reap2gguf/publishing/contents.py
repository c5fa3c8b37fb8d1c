"""What each repository is to contain after a push."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from reap2gguf.bundle.card_files import labelled_files
from reap2gguf.quantizing.labels import label_warnings

if TYPE_CHECKING:
    from reap2gguf.bundle.manifest import Manifest
    from reap2gguf.gguf_files.split import SplitPlan

# Larger files need Xet, and the Hub does not serve them over plain HTTP: see `upload_file` and
# MAX_HTTP_DOWNLOAD_SIZE in huggingface_hub.
HUB_MAX_BYTES = 50 * 10**9


@dataclass(frozen=True)
class PreparedFile:
    """A file as the repository is to hold it: a path on disk, or its bytes."""

    name: str
    content: Path | bytes
    n_bytes: int
    sha256: str  # empty in a dry run if it depends on parts that are not written
    changed_ns: int = 0  # modification time, if it is on disk

    @classmethod
    def on_disk(cls, path: Path, sha256: str) -> PreparedFile:
        """A file that is uploaded as it is, with a hash that is known."""
        stat = path.stat()
        return cls(path.name, path, stat.st_size, sha256, stat.st_mtime_ns)

    @classmethod
    def of_text(cls, name: str, text: str) -> PreparedFile:
        """A file that exists only in memory."""
        raw = text.encode("utf-8")
        return cls(name, raw, len(raw), hashlib.sha256(raw).hexdigest())


@dataclass(frozen=True)
class PreparedRepo:
    """Everything that a repository is to hold."""

    repo: str  # owner/name
    files: tuple[PreparedFile, ...]
    manifest: Manifest

    @property
    def n_bytes(self) -> int:
        return sum(file.n_bytes for file in self.files)


@dataclass(frozen=True)
class PreparedPush:
    """The repositories, and the plans of the files that were cut into parts."""

    hf: PreparedRepo | None  # None: the bundle has no safetensors
    gguf: PreparedRepo
    splits: tuple[SplitPlan, ...]

    @property
    def warnings(self) -> list[str]:
        """What will mislead users of the repositories, each with a way out."""
        return label_warnings(labelled_files(self.gguf.manifest.gguf))

    @property
    def repos(self) -> tuple[PreparedRepo, ...]:
        return (self.gguf,) if self.hf is None else (self.hf, self.gguf)
