"""Which files of a finished bundle are as the build left them.

A file with the size and the time of change that were recorded is taken for the same, and not read:
a bundle may have a hundred gigabytes. One with another time is hashed, since a copy has another
time too, and compared with the hash that the bundle records; if it is the same, its new time is
recorded. A byte that changed and left the time as it was is found by `reap2gguf verify` alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from reap2gguf.building.seals import Stamp, seal, stamps
from reap2gguf.bundle.layout import MANIFEST_FILE, SUMS_FILE
from reap2gguf.bundle.sums import read_sums

if TYPE_CHECKING:
    from reap2gguf.building.finished import Finished
    from reap2gguf.building.workdir import Workdir
    from reap2gguf.bundle.manifest import Manifest
    from reap2gguf.progress import Progress


@dataclass(frozen=True)
class Hashing:
    """How files are read whose time of change is another."""

    n_threads: int
    progress: Progress


@dataclass(frozen=True)
class Compared:
    """The files of a finished bundle, by path below the output, beside their record."""

    missing: frozenset[str] = frozenset()
    changed: frozenset[str] = frozenset()  # they have another size, or other bytes
    hashed: Mapping[str, Stamp] = field(default_factory=dict)
    # those with the same bytes and another time, as they are now

    def has(self, name: str) -> bool:
        """Whether a file is there as it was left."""
        return name not in self.missing and name not in self.changed


def compare(
    work: Workdir, finished: Finished, manifest: Manifest, hashing: Hashing | None
) -> Compared:
    """Compare all files with the record; without `hashing`, by their sizes alone.

    Raises OutputError if a file cannot be read, or changes meanwhile.
    """
    output, recorded = work.output, finished.stamps
    found = stamps(output, [output / name for name in recorded])
    missing = frozenset(recorded.keys() - found.keys())
    changed = {name for name, (size, _) in found.items() if size != recorded[name][0]}
    moved = {
        name: stamp
        for name, stamp in found.items()
        if stamp != recorded[name] and name not in changed
    }
    if hashing is None or not moved:
        return Compared(missing, frozenset(changed))
    sealed = seal(output, moved, hashing.n_threads, hashing.progress)
    expected = _hashes(work, finished, manifest)
    others = {name for name, one in sealed.items() if expected.get(name) not in (one.sha256, "")}
    same = {name: stamp for name, stamp in moved.items() if name not in others}
    return Compared(missing, frozenset(changed | others), same)


def _hashes(work: Workdir, finished: Finished, manifest: Manifest) -> dict[str, str]:
    """The recorded SHA-256 of each file, by path below the output.

    The record of the build has that of SHA256SUMS, which has those of the GGUF folder and of the
    manifest, which has those of the safetensors. Older records do not have the first: "".
    """
    hf, gguf = work.final_hf.name, work.final_gguf.name
    sums, _ = read_sums(work.final_gguf)
    found = {f"{gguf}/{name}": sha256 for name, sha256 in sums.items()}
    if manifest.hf is not None:
        found |= {f"{hf}/{name}": one.sha256 for name, one in manifest.hf.files.items()}
    if MANIFEST_FILE in sums:  # both folders have the same
        found[f"{hf}/{MANIFEST_FILE}"] = sums[MANIFEST_FILE]
    return {**found, f"{gguf}/{SUMS_FILE}": finished.sums_sha256}
