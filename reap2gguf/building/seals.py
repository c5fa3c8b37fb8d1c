"""What finished files looked like, so that one that changed since is not taken for the same.

A stamp is size and time of change, which costs nothing to compare. A seal has the SHA-256 as well:
what was verified is sealed, and only what still has its seal is published.

Files that a build writes are hashed while they are written (`disk/hashing.py`). Such a hash has the
stamp that the file had after its last byte, and counts only for a file that still has that stamp:
else the file is read and hashed again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from reap2gguf.bundle.records import FileRecord
from reap2gguf.errors import OutputError
from reap2gguf.files import file_sha256, is_own_file

if TYPE_CHECKING:
    from reap2gguf.disk.hashing import Hashes
    from reap2gguf.progress import Progress

Stamp = tuple[int, int]  # bytes, time of change in nanoseconds
Stamps = Mapping[str, Stamp]  # by path below the work folder


def stamps(root: Path, outputs: Iterable[Path]) -> dict[str, Stamp]:
    """The stamps of files and of all files in folders; a file that is not there has none."""
    files: set[Path] = set()
    for output in outputs:
        files.update(output.rglob("*") if output.is_dir() else (output,))
    return {
        file.relative_to(root).as_posix(): _stamp(file) for file in sorted(files) if file.is_file()
    }


def _stamp(file: Path) -> Stamp:
    stat = file.stat()
    return stat.st_size, stat.st_mtime_ns


def changed(root: Path, kept: Stamps) -> list[str]:
    """The files that are gone, or have another size or time of change than was kept."""
    return [
        name
        for name, (n_bytes, changed_ns) in kept.items()
        if not is_own_file(root / name) or _stamp(root / name) != (n_bytes, changed_ns)
    ]


@dataclass(frozen=True)
class Seal:
    """A file as it was when it was verified."""

    n_bytes: int
    changed_ns: int
    sha256: str

    @property
    def record(self) -> FileRecord:
        """What the manifest keeps of it."""
        return FileRecord(self.n_bytes, self.sha256)


def written_seals(root: Path, hashes: Hashes) -> dict[str, dict[str, Any]]:
    """The hashes of files that a stage has written, as plain JSON, for `seal` in a later stage.

    Waits until they are made. Raises OutputError if a file cannot be read back.
    """
    return {
        path.relative_to(root).as_posix(): asdict(Seal(one.n_bytes, one.changed_ns, one.sha256))
        for path, one in hashes.found().items()
    }


def seal(
    root: Path,
    kept: Stamps,
    n_threads: int,
    progress: Progress,
    written: Mapping[str, Seal] | None = None,
) -> dict[str, Seal]:
    """Hash the files of some stamps; those that were hashed while they were written are not read.

    Raises OutputError for a file that changed since: then what was verified is not what is hashed.
    """
    sealed = {
        name: one
        for name, one in (written or {}).items()
        if kept.get(name) == (one.n_bytes, one.changed_ns)
    }
    unread = {name: stamp for name, stamp in kept.items() if name not in sealed}
    sealed |= _read_and_seal(root, unread, n_threads, progress)
    refuse_changed(root, kept)
    return {name: sealed[name] for name in kept}


def _read_and_seal(root: Path, kept: Stamps, n_threads: int, progress: Progress) -> dict[str, Seal]:
    total = sum(n_bytes for n_bytes, _ in kept.values())
    if not kept:
        return {}
    lock = Lock()
    with progress.task("Hashing", total, "bytes") as task, ThreadPoolExecutor(n_threads) as pool:

        def advance(amount: float) -> None:
            with lock:
                task.advance(amount)

        hashes = pool.map(lambda name: file_sha256(root / name, advance), kept)
        return {
            name: Seal(*stamp, sha256)
            for (name, stamp), sha256 in zip(kept.items(), hashes, strict=True)
        }


def refuse_changed(root: Path, kept: Stamps) -> None:
    """Raises OutputError for a file that has changed since its stamp was taken."""
    if names := changed(root, kept):
        raise OutputError(
            f"{root / names[0]}: was changed by another program while the build was running; run "
            "the same command again when nothing writes there"
        )


def unsealed(
    root: Path, sealed: Mapping[str, Seal], n_threads: int, progress: Progress
) -> list[str]:
    """The files that no longer have the size, time and hash of their seals."""
    kept = {name: (one.n_bytes, one.changed_ns) for name, one in sealed.items()}
    if names := changed(root, kept):
        return names
    found = seal(root, kept, n_threads, progress)
    return [name for name, one in sealed.items() if found[name] != one]


def read_seals(values: Any) -> dict[str, Seal]:
    """Seals from JSON; none if they are malformed, so that the stage is done again."""
    try:
        return {name: Seal(**one) for name, one in values.items()}
    except (TypeError, AttributeError):
        return {}
