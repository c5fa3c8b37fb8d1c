"""Reads back what the Hub holds after an upload, and compares it with what was sent."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from reap2gguf.bundle.layout import HUB_FILES
from reap2gguf.errors import VerificationError
from reap2gguf.publishing.remote import RemoteRepo, fetch_small, look_up, patiently

if TYPE_CHECKING:
    from huggingface_hub import HfApi

    from reap2gguf.hub.retry import Sleep
    from reap2gguf.progress import Progress
    from reap2gguf.publishing.contents import PreparedFile, PreparedPush, PreparedRepo

_SMALL_BYTES = 2**23


def compare(
    api: HfApi, prepared: PreparedPush, progress: Progress, sleep: Sleep = time.sleep
) -> tuple[str, ...]:
    """Compare both repositories with what was sent; the files there that are not from this push.

    The hash of a large file is the one that the Hub's storage computed. A small file, of at most
    8 MiB, is downloaded into memory and compared byte for byte. Raises VerificationError with all
    differences, PublishError if the Hub does not answer.
    """
    violations: list[str] = []
    others: list[str] = []
    for contents in prepared.repos:
        repo = contents.repo
        remote = patiently(partial(look_up, api, repo), repo, progress.note, sleep)
        if remote is None:
            violations.append(f"{repo}: the repository does not exist")
            continue
        violations += _compare_files(api, contents, remote, progress, sleep)
        names = remote.files.keys() - {file.name for file in contents.files} - HUB_FILES
        others += [f"{repo}: {name}" for name in sorted(names)]
    if violations:
        raise VerificationError(violations, "run the same command again to send those files again")
    return tuple(others)


def _compare_files(
    api: HfApi, contents: PreparedRepo, remote: RemoteRepo, progress: Progress, sleep: Sleep
) -> Iterator[str]:
    """Differences in the names, sizes, hashes and small contents of a repository's files."""
    repo = contents.repo

    def fetch(file: PreparedFile) -> bytes:
        return patiently(
            lambda: fetch_small(api, repo, file.name, remote.commit, file.n_bytes),
            repo,
            progress.note,
            sleep,
        )

    with progress.task(f"Reading back {repo}", len(contents.files), "files") as task:
        for file in contents.files:
            found = remote.files.get(file.name)
            if found is None:
                yield f"{repo}: {file.name} is missing"
            elif found.n_bytes != file.n_bytes:
                yield f"{repo}: {file.name} has {found.n_bytes:,} bytes, expected {file.n_bytes:,}"
            elif not remote.holds(file):
                hash_name = "SHA-256" if found.sha256 is not None else "git hash"
                yield f"{repo}: {file.name} has a different {hash_name} than what was sent"
            elif found.sha256 is None and file.n_bytes <= _SMALL_BYTES:
                sent = file.content
                if fetch(file) != (sent.read_bytes() if isinstance(sent, Path) else sent):
                    yield f"{repo}: {file.name} was read back with other bytes than were sent"
            task.advance()
