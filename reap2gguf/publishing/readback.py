"""Asks the Hub what it holds after an upload, and compares it with what was sent."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from reap2gguf.hub.snapshot import Sleep
from reap2gguf.progress import Progress
from reap2gguf.publishing.remote import RemoteRepo, fetch_small, look, patiently
from reap2gguf.publishing.staging import StagedFile, StagedRepo
from reap2gguf.verifying.hashes import HUB_FILES

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_SMALL_BYTES = 2**23


@dataclass(frozen=True)
class Readback:
    """What differs between the Hub and what was sent; and files there that no push put there."""

    violations: tuple[str, ...]
    others: tuple[str, ...]


def read_back(
    api: HfApi,
    staged: StagedRepo,
    progress: Progress,
    sleep: Sleep = time.sleep,
) -> Readback:
    """Compare names, sizes and hashes of every file, and every byte of the small ones.

    The hash of a large file is the one that the Hub's storage computed; of a small one, which is
    at most 8 MiB and held in memory, the bytes are fetched again. Raises PublishError if the Hub
    cannot be asked.
    """
    note = progress.note
    there = patiently(lambda: look(api, staged.repo), staged.repo, note, sleep)
    if there is None:
        return Readback((f"{staged.repo}: the repository is not there",), ())
    violations: list[str] = []
    with progress.task(f"Reading back {staged.repo}", len(staged.files), "files") as task:
        for file in staged.files:
            violations += _compare(api, staged.repo, there, file, progress, sleep)
            task.advance()
    others = there.files.keys() - {file.name for file in staged.files} - HUB_FILES
    return Readback(tuple(violations), tuple(sorted(others)))


def _compare(
    api: HfApi,
    repo: str,
    there: RemoteRepo,
    file: StagedFile,
    progress: Progress,
    sleep: Sleep,
) -> Iterator[str]:
    found = there.files.get(file.name)
    if found is None:
        yield f"{repo}: {file.name} is missing"
    elif found.n_bytes != file.n_bytes:
        yield f"{repo}: {file.name} has {found.n_bytes:,} bytes, expected {file.n_bytes:,}"
    elif not there.holds(file):
        kind = "SHA-256" if found.sha256 is not None else "git hash"
        yield f"{repo}: {file.name} has another {kind} than what was sent"
    elif found.sha256 is None and file.n_bytes <= _SMALL_BYTES:
        handed = patiently(
            lambda: fetch_small(api, repo, file.name, there.commit, file.n_bytes),
            repo, progress.note, sleep,
        )  # fmt: skip
        sent = file.content
        if handed != (sent.read_bytes() if isinstance(sent, Path) else sent):
            yield f"{repo}: {file.name} comes back with other bytes than were sent"
