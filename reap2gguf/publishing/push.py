"""Publishes a finished bundle: two repositories on the Hub, complete, read back and compared.

The token is the one of huggingface_hub's own login. What a push keeps between two runs lies in
OUTPUT/.work/.NAME.push and is removed when it is done: parts of GGUF files that the Hub does not
take whole, and which repositories this push may write to.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from reap2gguf.atomic import make_folder, remove
from reap2gguf.building.workdir import Workdir
from reap2gguf.bundle.bundle_folders import check_bundle, open_bundle
from reap2gguf.bundle.card import CardNames
from reap2gguf.errors import VerificationError
from reap2gguf.gguf_files.split import HUB_MAX_BYTES
from reap2gguf.hub.snapshot import Sleep
from reap2gguf.progress import Progress
from reap2gguf.publishing.admission import Accepted, admit, check_visibility, log_in
from reap2gguf.publishing.readback import read_back
from reap2gguf.publishing.remote import check_name
from reap2gguf.publishing.staging import Staged, stage
from reap2gguf.publishing.upload import make_repo, upload

if TYPE_CHECKING:
    from huggingface_hub import HfApi


@dataclass(frozen=True)
class PushOptions:
    """What to publish, where and how."""

    bundle: Path
    repo: str  # owner/name; the GGUF files go to owner/name-GGUF
    private: bool = False
    max_bytes: int = HUB_MAX_BYTES
    threads: int = 1


@dataclass(frozen=True)
class Published:
    """The addresses of both repositories, and files there that are not of this bundle."""

    urls: tuple[str, ...]
    others: tuple[str, ...]


def names(repo: str) -> CardNames:
    """Both repositories of a push; PublishError if they cannot be names on the Hub."""
    found = CardNames(repo, f"{repo}-GGUF", on_hub=True)
    for name in (found.hf, found.gguf):
        check_name(name)
    return found


def push_folder(work: Workdir) -> Path:
    """Where a push keeps what it needs to go on."""
    return work.shared / f".{work.name}.push"


def push(options: PushOptions, progress: Progress, sleep: Sleep = time.sleep) -> Published:
    """Publish a bundle; the same call goes on where another one was stopped.

    Raises UsageError if it is no bundle, VerificationError if a file is not the one that was built
    or the Hub holds something else than was sent, PublishError if the Hub refuses, OutputError if
    parts of large files cannot be written.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

    disable_progress_bars()  # there is one for all files
    repos = names(options.repo)
    bundle = open_bundle(options.bundle)
    api = HfApi()
    log_in(api, repos.hf, progress, sleep)
    for name in (repos.hf, repos.gguf):
        check_visibility(api, name, options.private, progress, sleep)
    work = Workdir(bundle.hf.parent, bundle.hf.name)
    with work.locked():
        check_bundle(bundle, options.threads, progress)
        folder = push_folder(work)
        make_folder(folder)
        staged = stage(bundle, repos, options.max_bytes, folder, progress)
        going = {
            repo.repo: admit(api, repo, Accepted(folder), progress, sleep) for repo in staged.repos
        }
        for repo in staged.repos:
            make_repo(api, repo.repo, options.private, progress.note, sleep)
        for repo in staged.repos:
            upload(api, repo, going[repo.repo], progress, sleep)
        others = compare(api, staged, progress, sleep)
        remove(folder)
    return Published(tuple(f"{api.endpoint}/{r.repo}" for r in staged.repos), others)


def compare(
    api: HfApi, staged: Staged, progress: Progress, sleep: Sleep = time.sleep
) -> tuple[str, ...]:
    """Read both repositories back; files there that are not of this bundle.

    Raises VerificationError with every difference.
    """
    found = [read_back(api, repo, progress, sleep) for repo in staged.repos]
    if violations := [violation for each in found for violation in each.violations]:
        raise VerificationError(violations, "run the same command again to send those files anew")
    repos = (staged.hf.repo, staged.gguf.repo)
    return tuple(
        f"{repo}: {n}" for repo, each in zip(repos, found, strict=True) for n in each.others
    )
