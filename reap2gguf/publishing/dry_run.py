"""Says what a push would do: reads the bundle and, if it can be asked, the Hub; writes nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from reap2gguf.building.workdir import Workdir
from reap2gguf.bundle.bundle_folders import check_bundle, open_bundle
from reap2gguf.errors import PublishError
from reap2gguf.hub.errors import trouble
from reap2gguf.hub.snapshot import possible_errors
from reap2gguf.progress import Progress
from reap2gguf.publishing.admission import Accepted, check_owner, refuse_public, replaced_files
from reap2gguf.publishing.push import PushOptions, names, push_folder
from reap2gguf.publishing.remote import RemoteRepo, fetch_small, look, refusal
from reap2gguf.publishing.staging import Staged, StagedFile, stage

T = TypeVar("T")
TO_SEND, THERE, REPLACED, SAME_SIZE = "to upload", "there", "replaced", "there, by its size"


@dataclass(frozen=True)
class Preview:
    """What would be published, and what the Hub holds of it; None if it could not be asked."""

    staged: Staged
    there: dict[str, RemoteRepo | None] | None
    going: Mapping[str, Sequence[str]]  # by repository, the files of an earlier push to remove
    unchecked: tuple[str, ...] = ()  # what could not be seen to, and why

    def state(self, repo: str, file: StagedFile) -> str:
        """What would become of a file."""
        found = (self.there or {}).get(repo)
        if found is None or file.name not in found.files:
            return TO_SEND
        if not file.sha256:  # of a part that is not written, or their hashes
            same = found.files[file.name].n_bytes == file.n_bytes
            return SAME_SIZE if same else REPLACED
        return THERE if found.holds(file) else REPLACED


def preview(options: PushOptions, progress: Progress) -> Preview:
    """Check a bundle and plan its push.

    Raises UsageError, VerificationError and PublishError as `push` does; not where the Hub cannot
    be asked, or does not say who one is.
    """
    from huggingface_hub import HfApi

    repos = names(options.repo)
    bundle = open_bundle(options.bundle)
    check_bundle(bundle, options.threads, progress)
    staged = stage(bundle, repos, options.max_bytes, None, progress)
    api = HfApi()
    unchecked = []
    try:
        check_owner(_once(api.whoami, repos.hf), repos.hf)
    except PublishError as error:
        unchecked.append(f"the right to write ({error})")
    there: dict[str, RemoteRepo | None] = {}
    try:
        for repo in staged.repos:
            there[repo.repo] = _once(partial(look, api, repo.repo), repo.repo)
    except PublishError as error:
        unchecked.append(f"what is there already ({error})")
        return Preview(staged, None, {}, tuple(unchecked))
    kept = Workdir(bundle.hf.parent, bundle.hf.name)
    accepted = Accepted(push_folder(kept)).names()
    going = {}
    for repo in staged.repos:
        refuse_public(repo.repo, there[repo.repo], options.private)

        def fetch(name: str, commit: str, n_bytes: int, repo: str = repo.repo) -> bytes:
            return _once(partial(fetch_small, api, repo, name, commit, n_bytes), repo)

        is_accepted = repo.repo in accepted
        going[repo.repo] = replaced_files(repo, there[repo.repo], fetch, is_accepted)
    return Preview(staged, there, going, tuple(unchecked))


def _once(call: Callable[[], T], repo: str) -> T:
    """What the Hub answers; PublishError if it does not, without another try."""
    try:
        return call()
    except possible_errors() as error:
        found = refusal(error, repo)
        raise (
            found or PublishError(f"{repo}: the Hub cannot be reached ({trouble(error)})")
        ) from error
