"""Uploads what a repository is to hold; the only module that writes to the Hub.

Every large file is a commit of its own, small ones go together, and card, hashes and manifest come
last, in one commit with the removal of what an earlier push left: a repository that is only half
there does not look finished. Before each commit the repository is asked what it holds, and only
what is missing is sent; so the same command goes on wherever it was stopped. A commit names the one
before it, so that one whose answer was lost is not made twice.

Held in memory are the small files of one commit, at most 32 MiB, four times over: huggingface_hub
writes them into the commit as base64 text.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from reap2gguf.bundle.card import CARD_FILE
from reap2gguf.bundle.manifest import MANIFEST_FILE, SUMS_FILE
from reap2gguf.errors import PublishError
from reap2gguf.hub.snapshot import Note, Sleep
from reap2gguf.progress import Progress
from reap2gguf.publishing.pace import paced
from reap2gguf.publishing.remote import RemoteRepo, look, patiently
from reap2gguf.publishing.staging import StagedFile, StagedRepo

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi

LAST = (CARD_FILE, SUMS_FILE, MANIFEST_FILE)
LARGE_BYTES = 2**23
_BATCH_BYTES = 2**25
_BATCH_FILES = 100


@dataclass(frozen=True)
class Step:
    """What one commit adds, at most; files that are there already are left out of it."""

    message: str
    files: tuple[StagedFile, ...]
    removes: tuple[str, ...] = ()


def steps(staged: StagedRepo, stale: Sequence[str]) -> list[Step]:
    """The commits of an upload, in order; the last one removes `stale`."""
    first = [file for file in staged.files if file.name not in LAST]
    found = [Step(f"Upload {file.name}", (file,)) for file in first if file.n_bytes > LARGE_BYTES]
    small = [file for file in first if file.n_bytes <= LARGE_BYTES]
    found += [Step(f"Upload {_count(batch)}", tuple(batch)) for batch in _batches(small)]
    last = tuple(file for file in staged.files if file.name in LAST)
    return [*found, Step("Upload card, hashes and manifest", last, tuple(stale))]


def _batches(files: Sequence[StagedFile]) -> Iterator[list[StagedFile]]:
    batch: list[StagedFile] = []
    for file in files:
        too_much = sum(other.n_bytes for other in batch) + file.n_bytes > _BATCH_BYTES
        if batch and (too_much or len(batch) == _BATCH_FILES):
            yield batch
            batch = []
        batch.append(file)
    if batch:
        yield batch


def _count(files: Sequence[StagedFile]) -> str:
    return files[0].name if len(files) == 1 else f"{len(files)} small files"


def make_repo(api: HfApi, repo: str, private: bool, note: Note, sleep: Sleep = time.sleep) -> None:
    """Make the repository if there is none. Raises PublishError if it may not be made."""

    def make() -> None:
        api.create_repo(repo, private=private or None, repo_type="model", exist_ok=True)

    patiently(make, repo, note, sleep)


def upload(
    api: HfApi,
    staged: StagedRepo,
    stale: Sequence[str],
    progress: Progress,
    sleep: Sleep = time.sleep,
) -> None:
    """Bring a repository to hold what is staged, and remove `stale`.

    Raises PublishError if the Hub refuses or cannot be reached, or a file changes meanwhile.
    """
    there = patiently(lambda: _there(api, staged.repo), staged.repo, progress.note, sleep)
    missing = [file for file in staged.files if not there.holds(file)]
    if kept := len(staged.files) - len(missing):
        progress.note(f"{staged.repo}: {kept} of {len(staged.files)} files are there already")
    if stale:
        progress.note(f"{staged.repo}: of an earlier push, and go: {', '.join(stale)}")
    total = sum(file.n_bytes for file in missing)
    names = {file.name for file in missing}
    with progress.task(f"Uploading {staged.repo}", total, "bytes") as task:
        for step in steps(staged, stale):
            if names.isdisjoint(file.name for file in step.files) and not step.removes:
                continue
            sent = [file for file in step.files if file.name in names]
            paths = {f.content: f.n_bytes for f in sent if isinstance(f.content, Path)}
            with paced(paths, sum(file.n_bytes for file in sent), task):
                _take(api, staged.repo, step, progress.note, sleep)


def _take(api: HfApi, repo: str, step: Step, note: Note, sleep: Sleep) -> None:
    def commit() -> None:
        _commit(api, repo, step, note)

    patiently(commit, repo, note, sleep)
    for file in step.files:
        if isinstance(file.content, Path) and file.content.stat().st_mtime_ns != file.changed_ns:
            raise PublishError(
                f"{file.content}: changed while it was uploaded; run the same command again"
            )


def _there(api: HfApi, repo: str) -> RemoteRepo:
    found = look(api, repo)
    if found is None:
        raise PublishError(f"{repo}: was made, and is gone; run the same command again")
    return found


def _commit(api: HfApi, repo: str, step: Step, note: Note) -> None:
    """One commit of what the repository lacks of a step; none if it lacks nothing."""
    from huggingface_hub import CommitOperationDelete

    there = _there(api, repo)
    missing = [file for file in step.files if not there.holds(file)]
    stale = [name for name in step.removes if name in there.files]
    if not missing and not stale:
        return
    operations = [_addition(file) for file in missing]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        api.create_commit(
            repo,
            [*operations, *(CommitOperationDelete(name) for name in stale)],
            commit_message=step.message,
            parent_commit=there.commit,
        )
    for warning in told:
        if warning.category is UserWarning:  # of the card; others are huggingface_hub's own affair
            note(f"{repo}: {warning.message}")


def _addition(file: StagedFile) -> CommitOperationAdd:
    from huggingface_hub import CommitOperationAdd

    addition = CommitOperationAdd(path_in_repo=file.name, path_or_fileobj=file.content)
    # known, and so not computed again over files of many gigabytes
    addition.upload_info.sha256 = bytes.fromhex(file.sha256)
    return addition
