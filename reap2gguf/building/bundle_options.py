"""The arguments of `bundle`, checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from reap2gguf.errors import UsageError
from reap2gguf.machine import available_threads
from reap2gguf.options import MOST_THREADS, check_kind, check_number, check_path
from reap2gguf.quantizing.named import check_labels


@dataclass(frozen=True)
class BundleOptions:
    """The arguments of `bundle`: what single commands made."""

    folder: Path  # of `prune`, or a model that is not pruned
    files: tuple[Path, ...]  # GGUF files of that model
    source: str | None = None  # MODEL that was pruned
    imatrix: Path | None = None
    observations: Path | None = None
    text: Path | None = None  # that the importance matrix was computed on
    output: Path = Path("build")
    name: str | None = None  # None: the folder's
    labels: Mapping[str, str] = field(default_factory=dict)  # by file
    threads: int = field(default_factory=available_threads)

    def __post_init__(self) -> None:
        for name in ("folder", "output"):
            object.__setattr__(self, name, check_path(name, getattr(self, name)))
        for name in ("imatrix", "observations", "text"):
            if (path := getattr(self, name)) is not None:
                object.__setattr__(self, name, check_path(name, path))
        files = tuple(check_path("files", path) for path in self.files)
        object.__setattr__(self, "files", files)
        if not files:
            raise UsageError("no GGUF file was given; `reap2gguf quantize` writes one")
        if self.text is not None and self.imatrix is None:
            raise UsageError("--text is that of an importance matrix; pass it with --imatrix")
        if self.name is not None:
            check_kind("name", self.name, str)
        object.__setattr__(self, "labels", check_labels(self.labels))
        if unknown := sorted(self.labels.keys() - set(map(str, files))):
            raise UsageError(f"--label {unknown[0]}=...: no such file was given")
        check_number("threads", self.threads, 1, MOST_THREADS)
