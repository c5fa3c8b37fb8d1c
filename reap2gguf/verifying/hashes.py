"""Compares the files of a bundle with the hashes that were written down when it was finished."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path
from threading import Event, Lock

from reap2gguf.bundle.manifest import MANIFEST_FILE, SUMS_FILE, FileRecord, Manifest, hash_file
from reap2gguf.files import Advance, is_plain, is_plain_name

HUB_FILES = frozenset({".gitattributes"})  # which the Hub itself puts into every repository
_MAX_SUMS_BYTES = 2**22  # some ten thousand files
_SUM_LINE = re.compile(r"([0-9a-f]{64})  ([^/\\]+)")


def folder_bytes(*folders: Path) -> int:
    """The size of all files in some folders, which is what their hashes take to read."""
    files = (file for folder in folders for file in folder.iterdir() if file.is_file())
    return sum(file.stat().st_size for file in files)


def _unheard(amount: float) -> None:
    """Nobody watches."""


def check_hf_hashes(
    folder: Path,
    manifest: Manifest,
    n_threads: int = 1,
    advance: Advance = _unheard,
) -> Iterator[str]:
    """Every file of a safetensors folder against the manifest, and none besides.

    `advance` is told of each byte that was read.
    """
    for name in sorted(_present(folder) - manifest.hf.files.keys() - {MANIFEST_FILE}):
        yield f"{folder.name}: {name} is not in the manifest"
    yield from _compare_hashes(folder, manifest.hf.files, n_threads, advance)


def check_sums(
    folder: Path,
    n_threads: int,
    absent: Collection[str] = (),
    advance: Advance = _unheard,
) -> Iterator[str]:
    """Every file of the bundle against SHA256SUMS, and every file there against the bundle."""
    path = folder / SUMS_FILE
    if not path.is_file():
        yield f"{folder.name}: {SUMS_FILE} is missing"
        return
    if (size := path.stat().st_size) > _MAX_SUMS_BYTES:
        yield f"{folder.name}: {SUMS_FILE} has {size:,} bytes, expected at most {_MAX_SUMS_BYTES:,}"
        return
    expected, broken = read_sums(folder)
    if broken:
        more = f", nor are {len(broken) - 1:,} more" if len(broken) > 1 else ""
        yield f"{folder.name}: {SUMS_FILE} line {broken[0]} is not a hash and a name{more}"
    for name in sorted(_present(folder) - expected.keys() - {SUMS_FILE}):
        yield f"{folder.name}: {name} is not in {SUMS_FILE}"
    # what the manifest misses has been named already
    records = {n: FileRecord(-1, sha256) for n, sha256 in expected.items() if n not in absent}
    yield from _compare_hashes(folder, records, n_threads, advance)


def read_sums(folder: Path) -> tuple[dict[str, str], list[int]]:
    """The hashes of SHA256SUMS by name, and the numbers of lines that hold none."""
    return parse_sums((folder / SUMS_FILE).read_text(encoding="utf-8", errors="replace"))


def parse_sums(text: str) -> tuple[dict[str, str], list[int]]:
    """See `read_sums`."""
    expected: dict[str, str] = {}
    broken: list[int] = []
    for number, line in enumerate(text.splitlines(), start=1):
        match = _SUM_LINE.fullmatch(line)
        if match is None:
            broken.append(number)
        else:
            expected[match[2]] = match[1]
    return expected, broken


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
        else:
            present.append(name)
    lock, is_left = Lock(), Event()

    def told(amount: float) -> None:
        if is_left.is_set():
            raise CancelledError  # nobody waits: an interrupt must not last to the end of a file
        with lock:
            advance(amount)

    with ThreadPoolExecutor(n_threads) as pool:
        try:
            found = pool.map(lambda name: hash_file(folder / name, told), present)
            for name, record in zip(present, found, strict=True):
                if record.sha256 != expected[name].sha256:
                    yield f"{folder.name}: {name} has another SHA-256 than when it was published"
        finally:
            is_left.set()


def _present(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir() if file.is_file()} - HUB_FILES
