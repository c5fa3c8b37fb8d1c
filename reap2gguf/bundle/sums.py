"""SHA256SUMS, in the format of `sha256sum -c`: composed, read, and compared with the files."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path
from threading import Event, Lock

from reap2gguf.atomic import remove, write_whole
from reap2gguf.bundle.layout import SUMS_FILE
from reap2gguf.bundle.manifest import FileRecord, Manifest, hash_file
from reap2gguf.bundle.members import shown_name
from reap2gguf.files import Advance, is_own_file, is_plain_name, read_entry

_MAX_SUMS_BYTES = 2**22  # some ten thousand files
_ANY_SIZE = -1  # SHA256SUMS does not hold sizes
_SUM_LINE = re.compile(r"([0-9a-f]{64})  ([^/\\\r\n]+)")


def hash_folder(folder: Path, n_threads: int) -> dict[str, FileRecord]:
    """Size and hash of every file in a folder, by name."""
    return hash_files([file for file in folder.iterdir() if is_own_file(file)], n_threads)


def hash_files(files: Iterable[Path], n_threads: int) -> dict[str, FileRecord]:
    """Size and hash of some files of one folder, by name."""
    found = sorted(files)
    with ThreadPoolExecutor(n_threads) as pool:
        return dict(zip((f.name for f in found), pool.map(hash_file, found), strict=True))


def compose_sums(hashes: Mapping[str, str]) -> str:
    """The text of SHA256SUMS for hashes by file name."""
    return "".join(f"{sha256}  {name}\n" for name, sha256 in sorted(hashes.items()))


def parse_sums(text: str) -> tuple[dict[str, str], list[str]]:
    """The hashes in the text of SHA256SUMS by file name, and what is wrong with its lines.

    `sha256sum -c` checks every line. So a name has one line only, or two readers of one text could
    expect different hashes.
    """
    hashes: dict[str, str] = {}
    problems: list[str] = []
    previous = ""
    for number, line in enumerate(text.removesuffix("\n").split("\n"), start=1):
        match = _SUM_LINE.fullmatch(line)
        if match is None:
            problems.append(f"line {number} is not a hash and a name")
            continue
        name = match[2]
        if name in hashes:
            problems.append(f"line {number} names {shown_name(name)} again")
        elif name < previous:
            problems.append(f"line {number} ({shown_name(name)}) is not in the order of names")
        hashes[name] = match[1]
        previous = max(previous, name)
    return hashes, problems


def read_sums(folder: Path) -> tuple[dict[str, str], list[str]]:
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
    files = (file for folder in folders for file in folder.iterdir() if is_own_file(file))
    return sum(file.stat().st_size for file in files)


def _no_progress(amount: float) -> None:
    """Ignores progress."""


def check_hf_hashes(
    folder: Path,
    manifest: Manifest,
    n_threads: int = 1,
    advance: Advance = _no_progress,
) -> Iterator[str]:
    """Violations in a safetensors folder: files that are missing or changed.

    `check_members` names those that are too many. `advance` is called with the number of bytes of
    each piece read.
    """
    files = {} if manifest.hf is None else manifest.hf.files
    yield from _compare_hashes(folder, files, n_threads, advance)


def check_sums(
    folder: Path,
    members: Collection[str],
    n_threads: int,
    absent: Collection[str] = (),
    advance: Advance = _no_progress,
) -> Iterator[str]:
    """Violations in a GGUF folder: files that are missing, changed, or not once in SHA256SUMS.

    `members` are the names that it must hold, its own name apart. Files in `absent` have been
    reported as missing already. `advance` is as in `check_hf_hashes`.
    """
    path = folder / SUMS_FILE
    if not is_own_file(path):
        yield f"{folder.name}: {SUMS_FILE} is missing"
        return
    if (size := path.stat().st_size) > _MAX_SUMS_BYTES:
        yield f"{folder.name}: {SUMS_FILE} has {size:,} bytes, expected at most {_MAX_SUMS_BYTES:,}"
        return
    expected, problems = read_sums(folder)
    if problems:
        more = f" ({len(problems) - 1:,} more are wrong)" if len(problems) > 1 else ""
        yield f"{folder.name}: {SUMS_FILE} {problems[0]}{more}"
    wanted = set(members) - {SUMS_FILE}
    for name in sorted(wanted - expected.keys()):
        yield f"{folder.name}: {name} is not in {SUMS_FILE}"
    for name in sorted(expected.keys() - wanted):
        yield f"{folder.name}: {SUMS_FILE} names {shown_name(name)}, which is no part of the bundle"
    records = {
        name: FileRecord(_ANY_SIZE, sha256)
        for name, sha256 in expected.items()
        if name in wanted and name not in absent
    }
    yield from _compare_hashes(folder, records, n_threads, advance)


def _compare_hashes(
    folder: Path,
    expected: Mapping[str, FileRecord],
    n_threads: int,
    advance: Advance,
) -> Iterator[str]:
    present = []
    for name in expected:
        if not is_plain_name(name) or not os.path.lexists(folder / name):
            yield f"{folder.name}: {name} is missing"
        elif is_own_file(folder / name):  # `check_members` has reported what is not
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
                wanted = expected[name]
                if record.sha256 != wanted.sha256:
                    yield f"{folder.name}: {name} has a different SHA-256 than the build recorded"
                elif wanted.n_bytes not in (_ANY_SIZE, record.n_bytes):
                    yield (
                        f"{folder.name}: {name} has {record.n_bytes:,} bytes, the manifest says "
                        f"{wanted.n_bytes:,}"
                    )
        finally:
            stopped.set()
