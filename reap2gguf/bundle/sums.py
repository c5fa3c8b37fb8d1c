"""SHA256SUMS, in the format that `sha256sum -c` reads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from reap2gguf.atomic import remove, write_whole
from reap2gguf.bundle.manifest import SUMS_FILE, FileRecord, hash_file


def hash_folder(folder: Path, n_threads: int) -> dict[str, FileRecord]:
    """Size and hash of every file in a folder, by name."""
    files = sorted(file for file in folder.iterdir() if file.is_file())
    with ThreadPoolExecutor(n_threads) as pool:
        return dict(zip((f.name for f in files), pool.map(hash_file, files), strict=True))


def write_sums(folder: Path, n_threads: int) -> None:
    """Write SHA256SUMS over every other file in the folder."""
    path = folder / SUMS_FILE
    remove(path)
    lines = [
        f"{record.sha256}  {name}\n" for name, record in hash_folder(folder, n_threads).items()
    ]
    write_whole(path, "".join(lines))
