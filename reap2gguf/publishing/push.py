"""Publishes a finished bundle: its repositories on the Hub, complete, read back and compared.

The token is that of huggingface_hub's own login. Until a push is finished, OUTPUT/.work/.NAME.push
holds what it needs to resume: the parts of GGUF files that are too large for the Hub, and the
repositories that this push may write to.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from reap2gguf.atomic import make_folder, remove
from reap2gguf.bundle.card_files import CardNames
from reap2gguf.bundle.layout import GGUF_SUFFIX, gguf_name
from reap2gguf.bundle.opening import open_bundle
from reap2gguf.errors import PublishError
from reap2gguf.hub.errors import reason_of, request_errors
from reap2gguf.publishing.admission import (
    AcceptedRepos,
    admit,
    check_login,
    check_owner,
    check_visibility,
    files_to_remove,
    refuse_public,
)
from reap2gguf.publishing.contents import HUB_MAX_BYTES, PreparedFile, PreparedPush
from reap2gguf.publishing.prepare import prepare
from reap2gguf.publishing.readback import compare
from reap2gguf.publishing.remote import RemoteRepo, check_name, fetch_small, look_up, refusal
from reap2gguf.publishing.upload import make_repo, upload

if TYPE_CHECKING:
    from huggingface_hub import HfApi

    from reap2gguf.bundle.opening import OpenBundle
    from reap2gguf.hub.retry import Sleep
    from reap2gguf.progress import Progress

T = TypeVar("T")
# compares the files of a bundle with their record; raises VerificationError
CheckBundle = Callable[["OpenBundle", int, "Progress"], None]
TO_UPLOAD, UNCHANGED, REPLACED = "to upload", "already there", "will be replaced"
SAME_SIZE = "already there (same size)"


@dataclass(frozen=True)
class PushOptions:
    """What to publish, where and how."""

    bundle: Path
    repo: str  # owner/name; the GGUF files go to owner/name-GGUF
    private: bool = False
    max_bytes: int = HUB_MAX_BYTES  # larger GGUF files are cut into parts
    threads: int = 1


@dataclass(frozen=True)
class Published:
    """The addresses of the repositories, and the files in them that are not from this bundle."""

    urls: tuple[str, ...]
    others: tuple[str, ...]


def push(
    options: PushOptions, check: CheckBundle, progress: Progress, sleep: Sleep = time.sleep
) -> Published:
    """Publish a bundle that `check` accepts. To resume a push, make the same call again.

    Raises UsageError if it is not a bundle, VerificationError if a file is not as it was built or
    the Hub holds other bytes than were sent, PublishError if the Hub refuses, OutputError if parts
    of large files cannot be written.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

    disable_progress_bars()  # `progress` shows one bar for all files
    names, bundle = _opened(options)
    api = HfApi()
    check_login(api, _repos(names, bundle)[0], progress, sleep)
    for repo in _repos(names, bundle):
        check_visibility(api, repo, options.private, progress, sleep)
    with bundle.folders.locked():
        check(bundle, options.threads, progress)
        folder = bundle.folders.push
        make_folder(folder)
        prepared = prepare(bundle, names, options.max_bytes, folder, progress)
        for warning in prepared.warnings:
            progress.note(warning)
        accepted = AcceptedRepos(folder)
        outdated = {r.repo: admit(api, r, accepted, progress, sleep) for r in prepared.repos}
        for contents in prepared.repos:
            make_repo(api, contents.repo, options.private, progress.note, sleep)
        for contents in prepared.repos:
            upload(api, contents, outdated[contents.repo], progress, sleep)
        others = compare(api, prepared, progress, sleep)
        remove(folder)
    return Published(tuple(f"{api.endpoint}/{repo}" for repo in _repos(names, bundle)), others)


def _opened(options: PushOptions) -> tuple[CardNames, OpenBundle]:
    """The repositories of a push and the bundle; a wrong name is refused before anything is read.

    A bundle without safetensors has one repository, which may be named with its -GGUF.
    """
    names = repo_names(options.repo)
    bundle = open_bundle(options.bundle)
    if bundle.hf is None and options.repo.endswith(GGUF_SUFFIX):
        names = repo_names(options.repo.removesuffix(GGUF_SUFFIX))
    return names, bundle


def _repos(names: CardNames, bundle: OpenBundle) -> tuple[str, ...]:
    return (names.gguf,) if bundle.hf is None else (names.hf, names.gguf)


def repo_names(repo: str) -> CardNames:
    """Both repositories of a push. Raises PublishError if the Hub does not allow their names."""
    names = CardNames(repo, gguf_name(repo), on_hub=True)
    for name in (names.hf, names.gguf):
        check_name(name)
    return names


@dataclass(frozen=True)
class Preview:
    """What a push would upload, and what the Hub holds; None if the Hub did not answer."""

    prepared: PreparedPush
    remote: Mapping[str, RemoteRepo | None] | None  # None: no such repository yet
    outdated: Mapping[str, Sequence[str]]  # by repository, files of an earlier push to remove
    unchecked: tuple[str, ...] = ()  # what could not be checked, and why

    def state(self, repo: str, file: PreparedFile) -> str:
        """What would happen to a file."""
        remote = (self.remote or {}).get(repo)
        if remote is None or file.name not in remote.files:
            return TO_UPLOAD
        if not file.sha256:  # a part that is not written yet, or the hashes of such parts
            same = remote.files[file.name].n_bytes == file.n_bytes
            return SAME_SIZE if same else REPLACED
        return UNCHANGED if remote.holds(file) else REPLACED

    def to_upload(self, repo: str) -> list[PreparedFile]:
        """The files that would be uploaded to a repository."""
        (contents,) = (contents for contents in self.prepared.repos if contents.repo == repo)
        return [f for f in contents.files if self.state(repo, f) in (TO_UPLOAD, REPLACED)]


def preview(options: PushOptions, check: CheckBundle, progress: Progress) -> Preview:
    """A dry run of `push`: read the bundle and, if it answers, the Hub; write nothing.

    Raises UsageError, VerificationError and PublishError as `push` does, except if the Hub does not
    answer or the token is refused.
    """
    from huggingface_hub import HfApi

    names, bundle = _opened(options)
    check(bundle, options.threads, progress)
    prepared = prepare(bundle, names, options.max_bytes, None, progress)
    api = HfApi()
    unchecked = []
    try:
        first = _repos(names, bundle)[0]
        check_owner(_without_retry(api.whoami, first), first)
    except PublishError as error:
        unchecked.append(f"the permission to write ({error})")
    try:
        repos = _repos(names, bundle)
        remote = {repo: _without_retry(partial(look_up, api, repo), repo) for repo in repos}
    except PublishError as error:
        unchecked.append(f"which files exist already ({error})")
        return Preview(prepared, None, {}, tuple(unchecked))
    accepted = AcceptedRepos(bundle.folders.push).names()
    outdated = {}
    for contents in prepared.repos:
        repo = contents.repo
        refuse_public(repo, remote[repo], options.private)
        fetch = partial(_fetch_without_retry, api, repo)
        outdated[repo] = files_to_remove(contents, remote[repo], fetch, repo in accepted)
    return Preview(prepared, remote, outdated, tuple(unchecked))


def _fetch_without_retry(api: HfApi, repo: str, name: str, commit: str, max_bytes: int) -> bytes:
    return _without_retry(partial(fetch_small, api, repo, name, commit, max_bytes), repo)


def _without_retry(call: Callable[[], T], repo: str) -> T:
    """What the Hub answers. Raises PublishError if it does not, without another try."""
    try:
        return call()
    except request_errors() as error:
        found = refusal(error, repo)
        raise (
            found or PublishError(f"{repo}: the Hub cannot be reached ({reason_of(error)})")
        ) from error
