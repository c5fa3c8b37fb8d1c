"""SHA256SUMS, in the format of `sha256sum -c`: composed, read, and compared with the files."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path
from threading import Event, Lock

from reap2gguf.atomic import remove, write_whole
from reap2gguf.bundle.layout import HUB_FILES, MANIFEST_FILE, SUMS_FILE
from reap2gguf.bundle.manifest import FileRecord, Manifest, hash_file
from reap2gguf.files import Advance, is_plain, is_plain_name, leads_away, read_entry

_MAX_SUMS_BYTES = 2**22  # some ten thousand files
_SUM_LINE = re.compile(r"([0-9a-f]{64})  ([^/\\]+)")


def hash_folder(folder: Path, n_threads: int) -> dict[str, FileRecord]:
    """Size and hash of every file in a folder, by name."""
    files = sorted(file for file in folder.iterdir() if file.is_file())
    with ThreadPoolExecutor(n_threads) as pool:
        return dict(zip((f.name for f in files), pool.map(hash_file, files), strict=True))


def compose_sums(hashes: Mapping[str, str]) -> str:
    """The text of SHA256SUMS for hashes by file name."""
    return "".join(f"{sha256}  {name}\n" for name, sha256 in sorted(hashes.items()))


def parse_sums(text: str) -> tuple[dict[str, str], list[int]]:
    """The hashes in the text of SHA256SUMS by file name, and the numbers of malformed lines."""
    hashes: dict[str, str] = {}
    malformed: list[int] = []
    for number, line in enumerate(text.splitlines(), start=1):
        match = _SUM_LINE.fullmatch(line)
        if match is None:
            malformed.append(number)
        else:
            hashes[match[2]] = match[1]
    return hashes, malformed


def read_sums(folder: Path) -> tuple[dict[str, str], list[int]]:
    """`parse_sums` of the SHA256SUMS in a folder."""
    return parse_sums(read_entry(folder / SUMS_FILE, _MAX_SUMS_BYTES).decode("utf-8", "replace"))


def write_sums(folder: Path, n_threads: int) -> None:
    """Write SHA256SUMS over every other file in the folder; OutputError if the disk refuses."""
    remove(folder / SUMS_FILE)
    records = hash_folder(folder, n_threads)
    sums = compose_sums({name: record.sha256 for name, record in records.items()})
    write_whole(folder / SUMS_FILE, sums)


def folder_bytes(*folders: Path) -> int:
    """The size of all files in some folders: how much there is to read for their hashes."""
    files = (file for folder in folders for file in folder.iterdir() if file.is_file())
    return sum(file.stat().st_size for file in files)


def _no_progress(amount: float) -> None:
    """Ignores progress."""


def check_hf_hashes(
    folder: Path,
    manifest: Manifest,
    n_threads: int = 1,
    advance: Advance = _no_progress,
) -> Iterator[str]:
    """Violations in a safetensors folder: files that are missing, changed or not in the manifest.

    `advance` is called with the number of bytes of each piece read.
    """
    for name in sorted(_present(folder) - manifest.hf.files.keys() - {MANIFEST_FILE}):
        yield f"{folder.name}: {name} is not in the manifest"
    yield from _compare_hashes(folder, manifest.hf.files, n_threads, advance)


def check_sums(
    folder: Path,
    n_threads: int,
    absent: Collection[str] = (),
    advance: Advance = _no_progress,
) -> Iterator[str]:
    """Violations in a GGUF folder: files that are missing, changed or not in SHA256SUMS.

    Files in `absent` have been reported as missing already. `advance` is as in `check_hf_hashes`.
    """
    path = folder / SUMS_FILE
    if not path.is_file():
        yield f"{folder.name}: {SUMS_FILE} is missing"
        return
    if (size := path.stat().st_size) > _MAX_SUMS_BYTES:
        yield f"{folder.name}: {SUMS_FILE} has {size:,} bytes, expected at most {_MAX_SUMS_BYTES:,}"
        return
    expected, malformed = read_sums(folder)
    if malformed:
        more = f" ({len(malformed) - 1:,} more are not)" if len(malformed) > 1 else ""
        yield f"{folder.name}: {SUMS_FILE} line {malformed[0]} is not a hash and a name{more}"
    for name in sorted(_present(folder) - expected.keys() - {SUMS_FILE}):
        yield f"{folder.name}: {name} is not in {SUMS_FILE}"
    records = {n: FileRecord(-1, sha256) for n, sha256 in expected.items() if n not in absent}
    yield from _compare_hashes(folder, records, n_threads, advance)


def _compare_hashes(
    folder: Path,
    expected: Mapping[str, FileRecord],
    n_threads: int,
    advance: Advance,
) -> Iterator[str]:
    present = []
    for name in expected:
        if not is_plain_name(name) or not is_plain(folder / name):
            yield f"{folder.name}: {name} is missing"
        elif leads_away(folder / name):
            yield f"{folder.name}: {name} is a link, expected a file of the bundle itself"
        else:
            present.append(name)
    lock, stopped = Lock(), Event()

    def report(amount: float) -> None:
        if stopped.is_set():
            raise CancelledError  # after an interrupt, do not read a large file to its end
        with lock:
            advance(amount)

    with ThreadPoolExecutor(n_threads) as pool:
        try:
            found = pool.map(lambda name: hash_file(folder / name, report), present)
            for name, record in zip(present, found, strict=True):
                if record.sha256 != expected[name].sha256:
                    yield f"{folder.name}: {name} has a different SHA-256 than the build recorded"
        finally:
            stopped.set()


def _present(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir() if file.is_file()} - HUB_FILES
