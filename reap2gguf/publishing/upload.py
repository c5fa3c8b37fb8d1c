"""Uploads what a repository is to hold; the only module that writes to the Hub.

Each large file is one commit, and small files go together. Card, hashes and manifest come last, in
one commit with the removal of an earlier push's files: an incomplete repository does not look
finished. Before each commit, the Hub is asked what the repository holds, and only what is missing
is sent, so the same command resumes an interrupted push. Each commit names its parent: a commit
whose answer was lost is not made twice.

Memory: the small files of one commit, at most 32 MiB, four times over, since huggingface_hub writes
them into the request as base64 text.

Progress: huggingface_hub reports none to its caller, and hf_xet reads the files in Rust. Both keep
the files open while they read them, and Linux shows the position in an open file. On other systems,
a file counts when it is done.
"""

from __future__ import annotations

import os
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from reap2gguf.bundle.layout import CARD_FILE, MANIFEST_FILE, SUMS_FILE
from reap2gguf.errors import PublishError
from reap2gguf.publishing.remote import RemoteRepo, look_up, patiently

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi

    from reap2gguf.hub.retry import Note, Sleep
    from reap2gguf.progress import Progress, Task
    from reap2gguf.publishing.contents import PreparedFile, PreparedRepo

LAST = (CARD_FILE, SUMS_FILE, MANIFEST_FILE)
LARGE_BYTES = 2**23
_BATCH_BYTES = 2**25
_BATCH_FILES = 100
_POLL_SECONDS = 0.5
_OPEN_FILES, _POSITIONS = Path("/proc/self/fd"), Path("/proc/self/fdinfo")


@dataclass(frozen=True)
class PlannedCommit:
    """What one commit adds and removes; files that the Hub holds already are not sent."""

    message: str
    files: tuple[PreparedFile, ...]
    removes: tuple[str, ...] = ()


def plan_commits(contents: PreparedRepo, outdated: Sequence[str]) -> list[PlannedCommit]:
    """The commits of an upload, in order; the last one removes `outdated`."""
    first = [file for file in contents.files if file.name not in LAST]
    large = [file for file in first if file.n_bytes > LARGE_BYTES]
    small = [file for file in first if file.n_bytes <= LARGE_BYTES]
    last = tuple(file for file in contents.files if file.name in LAST)
    return [
        *(PlannedCommit(f"Upload {file.name}", (file,)) for file in large),
        *(PlannedCommit(f"Upload {_title(batch)}", tuple(batch)) for batch in _batches(small)),
        PlannedCommit("Upload card, hashes and manifest", last, tuple(outdated)),
    ]


def _batches(files: Sequence[PreparedFile]) -> Iterator[list[PreparedFile]]:
    batch: list[PreparedFile] = []
    for file in files:
        too_much = sum(other.n_bytes for other in batch) + file.n_bytes > _BATCH_BYTES
        if batch and (too_much or len(batch) == _BATCH_FILES):
            yield batch
            batch = []
        batch.append(file)
    if batch:
        yield batch


def _title(files: Sequence[PreparedFile]) -> str:
    return files[0].name if len(files) == 1 else f"{len(files)} small files"


def make_repo(api: HfApi, repo: str, private: bool, note: Note, sleep: Sleep = time.sleep) -> None:
    """Create the repository if there is none. Raises PublishError if the Hub refuses."""

    def make() -> None:
        api.create_repo(repo, private=private or None, repo_type="model", exist_ok=True)

    patiently(make, repo, note, sleep)


def upload(
    api: HfApi,
    contents: PreparedRepo,
    outdated: Sequence[str],
    progress: Progress,
    sleep: Sleep = time.sleep,
) -> None:
    """Upload what a repository lacks of `contents`, and remove the files in `outdated`.

    Raises PublishError if the Hub refuses or does not answer, or if a file changes meanwhile.
    """
    repo = contents.repo
    remote = patiently(lambda: _existing(api, repo), repo, progress.note, sleep)
    missing = [file for file in contents.files if not remote.holds(file)]
    if n_there := len(contents.files) - len(missing):
        progress.note(f"{repo}: {n_there} of {len(contents.files)} files are there already")
    if outdated:
        progress.note(f"{repo}: removing files of an earlier push: {', '.join(outdated)}")
    total = sum(file.n_bytes for file in missing)
    names = {file.name for file in missing}
    with progress.task(f"Uploading {repo}", total, "bytes") as task:
        for planned in plan_commits(contents, outdated):
            to_send = [file for file in planned.files if file.name in names]
            if to_send or planned.removes:
                with report_reading(to_send, task):
                    _make_commit(api, repo, planned, progress.note, sleep)


def _make_commit(api: HfApi, repo: str, planned: PlannedCommit, note: Note, sleep: Sleep) -> None:
    patiently(lambda: _try_commit(api, repo, planned, note), repo, note, sleep)
    for file in planned.files:
        if isinstance(file.content, Path) and file.content.stat().st_mtime_ns != file.changed_ns:
            raise PublishError(
                f"{file.content}: changed while it was uploaded; run the same command again"
            )


def _existing(api: HfApi, repo: str) -> RemoteRepo:
    """What a repository holds that this push has created or found."""
    remote = look_up(api, repo)
    if remote is None:
        raise PublishError(f"{repo}: was deleted meanwhile; run the same command again")
    return remote


def _try_commit(api: HfApi, repo: str, planned: PlannedCommit, note: Note) -> None:
    """Commit what the repository lacks of a planned commit, if it lacks anything."""
    from huggingface_hub import CommitOperationDelete

    remote = _existing(api, repo)
    missing = [file for file in planned.files if not remote.holds(file)]
    outdated = [name for name in planned.removes if name in remote.files]
    if not missing and not outdated:
        return
    additions = [_addition(file) for file in missing]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        api.create_commit(
            repo,
            [*additions, *(CommitOperationDelete(name) for name in outdated)],
            commit_message=planned.message,
            parent_commit=remote.commit,
        )
    for warning in caught:
        # about the card; other warnings are about huggingface_hub itself
        if warning.category is UserWarning:
            note(f"{repo}: {warning.message}")


def _addition(file: PreparedFile) -> CommitOperationAdd:
    from huggingface_hub import CommitOperationAdd

    addition = CommitOperationAdd(path_in_repo=file.name, path_or_fileobj=file.content)
    # known already: huggingface_hub need not hash files of many gigabytes again
    addition.upload_info.sha256 = bytes.fromhex(file.sha256)
    return addition


@contextmanager
def report_reading(files: Sequence[PreparedFile], task: Task) -> Iterator[None]:
    """Advance `task` by what is read of `files` while the context is open.

    At a normal end, the total is the size of all files: bytes that no position showed are added.
    """
    sizes = {file.content: file.n_bytes for file in files if isinstance(file.content, Path)}
    read = dict.fromkeys(sizes, 0)
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(_POLL_SECONDS):
            for path, position in _positions(sizes):
                # a retry reads again from an earlier position
                further = min(position, sizes[path]) - read[path]
                if further > 0:
                    read[path] += further
                    task.advance(further)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()
    task.advance(sum(file.n_bytes for file in files) - sum(read.values()))


def _positions(files: Mapping[Path, int]) -> Iterator[tuple[Path, int]]:
    """The current positions in those of `files` that this process has open."""
    names = {os.path.realpath(path): path for path in files}
    with suppress(OSError):  # not Linux
        for descriptor in os.listdir(_OPEN_FILES):
            with suppress(OSError, ValueError, IndexError):  # closed meanwhile
                path = names.get(os.readlink(_OPEN_FILES / descriptor))
                if path is not None:
                    info = (_POSITIONS / descriptor).read_text(encoding="ascii")
                    yield path, int(info.split("pos:")[1].split()[0])
