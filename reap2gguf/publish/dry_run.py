"""Says what a push would do: reads the bundle and, if it can be asked, the Hub; writes nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from reap2gguf.checkpoint.hub import possible_errors
from reap2gguf.checkpoint.hub_errors import trouble
from reap2gguf.errors import PublishError
from reap2gguf.progress import Progress
from reap2gguf.publish.bundle_folders import check_bundle, open_bundle
from reap2gguf.publish.push import PushOptions, names
from reap2gguf.publish.remote import RemoteRepo, look, refusal
from reap2gguf.publish.staging import Staged, StagedFile, stage

if TYPE_CHECKING:
    from huggingface_hub import HfApi

TO_SEND, THERE, REPLACED, SAME_SIZE = "to upload", "there", "replaced", "there, by its size"


@dataclass(frozen=True)
class Preview:
    """What would be published, and what the Hub holds of it; `unasked` says why it is not known."""

    staged: Staged
    there: dict[str, RemoteRepo | None]
    unasked: str = ""

    def state(self, repo: str, file: StagedFile) -> str:
        """What would become of a file."""
        found = self.there.get(repo)
        if found is None or file.name not in found.files:
            return TO_SEND
        if not file.sha256:  # of a part that is not written, or their hashes
            same = found.files[file.name].n_bytes == file.n_bytes
            return SAME_SIZE if same else REPLACED
        return THERE if found.holds(file) else REPLACED


def preview(options: PushOptions, progress: Progress) -> Preview:
    """Check a bundle and plan its push.

    Raises UsageError, VerificationError and PublishError as `push` does, but not for what only the
    Hub could say.
    """
    from huggingface_hub import HfApi

    repos = names(options.repo)
    bundle = open_bundle(options.bundle)
    check_bundle(bundle, options.threads, progress)
    staged = stage(bundle, repos, options.max_bytes, None, progress)
    api = HfApi()
    there: dict[str, RemoteRepo | None] = {}
    for repo in staged.repos:
        try:
            there[repo.repo] = _ask_once(api, repo.repo)
        except PublishError as error:
            return Preview(staged, {}, str(error))
    return Preview(staged, there)


def _ask_once(api: HfApi, repo: str) -> RemoteRepo | None:
    """What is there; PublishError if the Hub does not say, without another try."""
    try:
        return look(api, repo)
    except possible_errors() as error:
        found = refusal(error, repo)
        raise found or PublishError(
            f"{repo}: the Hub cannot be reached ({trouble(error)})"
        ) from error
