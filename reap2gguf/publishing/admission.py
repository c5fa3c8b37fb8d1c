"""Whether a push may write to a repository, and which of the files there it replaces."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reap2gguf.atomic import write_whole
from reap2gguf.bundle.card import CARD_FILE
from reap2gguf.bundle.manifest import MANIFEST_FILE, SUMS_FILE
from reap2gguf.checkpoint.config import read_json
from reap2gguf.errors import CheckpointError, PublishError
from reap2gguf.gguf_files.gguf_split import part_of_split
from reap2gguf.hub.snapshot import Sleep
from reap2gguf.messages import shown
from reap2gguf.progress import Progress
from reap2gguf.publishing.remote import RemoteRepo, fetch_small, look, patiently
from reap2gguf.publishing.staging import StagedRepo
from reap2gguf.verifying.hashes import HUB_FILES, parse_sums

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_MAX_BYTES = 2**26  # of a manifest
_STATE = "repositories.json"
Fetch = Callable[[str, str, int], bytes]  # a small file by its name, commit and size


def log_in(api: HfApi, repo: str, progress: Progress, sleep: Sleep = time.sleep) -> None:
    """See that there is a token, and that it may write as the repository's owner.

    Raises PublishError if not.
    """
    check_owner(patiently(api.whoami, repo, progress.note, sleep), repo)


def check_owner(who: dict[str, Any], repo: str) -> None:
    """Refuse a token that is not of the owner nor of a member, or may only read; PublishError."""
    owner = repo.partition("/")[0]
    may = [str(who.get("name")), *(str(org.get("name")) for org in who.get("orgs") or ())]
    if owner.lower() not in (name.lower() for name in may):
        raise PublishError(
            f"{repo}: the token is that of {shown(who.get('name'))}, who is not {owner} nor in an "
            f"organization of that name; publish as one of {', '.join(map(shown, may))}, or run "
            "`hf auth login`"
        )
    role = ((who.get("auth") or {}).get("accessToken") or {}).get("role")
    if role == "read":
        raise PublishError(
            f"{repo}: the token may only read; run `hf auth login` with one that may write"
        )


def _ask(api: HfApi, repo: str, progress: Progress, sleep: Sleep) -> RemoteRepo | None:
    return patiently(lambda: look(api, repo), repo, progress.note, sleep)


def check_visibility(
    api: HfApi,
    repo: str,
    private: bool,
    progress: Progress,
    sleep: Sleep = time.sleep,
) -> None:
    """Refuse to publish in public what is to be private; PublishError."""
    refuse_public(repo, _ask(api, repo, progress, sleep), private)


def refuse_public(repo: str, there: RemoteRepo | None, private: bool) -> None:
    """PublishError if what is to be private would go to a public repository."""
    if there is not None and private and not there.is_private:
        raise PublishError(
            f"{repo}: exists and is public; make it private in its settings, push without "
            "--private, or name another"
        )


class Accepted:
    """The repositories that this push has found to be its own, kept for when it goes on."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / _STATE

    def names(self) -> list[str]:
        try:
            found = read_json(self._path).get("accepted")
        except CheckpointError:
            return []
        return found if isinstance(found, list) else []

    def add(self, repo: str) -> None:
        write_whole(self._path, json.dumps({"accepted": sorted({*self.names(), repo})}))


def admit(
    api: HfApi,
    staged: StagedRepo,
    accepted: Accepted,
    progress: Progress,
    sleep: Sleep = time.sleep,
) -> list[str]:
    """See that a repository may be written to, and keep that; the files in it that go.

    Raises PublishError if the repository is somebody else's work.
    """
    there = _ask(api, staged.repo, progress, sleep)

    def fetch(name: str, commit: str, n_bytes: int) -> bytes:
        return patiently(
            lambda: fetch_small(api, staged.repo, name, commit, n_bytes),
            staged.repo, progress.note, sleep,
        )  # fmt: skip

    going = replaced_files(staged, there, fetch, staged.repo in accepted.names())
    accepted.add(staged.repo)
    return going


def replaced_files(
    staged: StagedRepo, there: RemoteRepo | None, fetch: Fetch, is_accepted: bool
) -> list[str]:
    """The files of a repository that a push removes; PublishError if it may not write there.

    It may if there is none, if its manifest is of this bundle's name, if this push has begun to
    fill it, or if it holds no file that would be overwritten. Files go that the manifest there
    names and this bundle has not, and parts of the same GGUF files cut otherwise; whatever else
    lies there stays.
    """
    if there is None:
        return []
    earlier = _earlier(staged, there, fetch)
    if earlier is None and not is_accepted:
        free = {CARD_FILE, *HUB_FILES}
        taken = [
            file.name for file in staged.files
            if file.name in there.files and file.name not in free and not there.holds(file)
        ]  # fmt: skip
        if taken:
            raise PublishError(
                f"{staged.repo}: holds another {taken[0]} and is no earlier push of "
                f"{staged.manifest.name}; name another repository, or empty that one"
            )
    return stale_files(staged, there, earlier or ())


def _earlier(staged: StagedRepo, there: RemoteRepo, fetch: Fetch) -> set[str] | None:
    """The files that an earlier push has written down; None if the repository has no manifest.

    Raises PublishError if the manifest is of another bundle.
    """

    def read(name: str) -> bytes:
        found = there.files.get(name)
        if found is None or found.n_bytes > _MAX_BYTES:
            return b""
        return fetch(name, there.commit, found.n_bytes)

    if MANIFEST_FILE not in there.files:
        return None
    try:
        values = json.loads(read(MANIFEST_FILE))
    except (ValueError, RecursionError):
        values = None
    name = values.get("name") if isinstance(values, dict) else None
    if name != staged.manifest.name:
        raise PublishError(
            f"{staged.repo}: holds the bundle {shown(name)}, and this one is "
            f"{staged.manifest.name}; name another repository"
        )
    return {*_named(values), *parse_sums(read(SUMS_FILE).decode("utf-8", "replace"))[0]}


def stale_files(staged: StagedRepo, there: RemoteRepo, earlier: Collection[str]) -> list[str]:
    """Files there that an earlier push put there and this one has not."""
    named = set(earlier)
    whole = {record.file for record in staged.manifest.gguf}
    for name in there.files:
        part = part_of_split(name)
        if name in whole or (part is not None and f"{part[0]}.gguf" in whole):
            named.add(name)
    kept = {file.name for file in staged.files} | HUB_FILES
    return sorted(named & there.files.keys() - kept)


def _named(manifest: dict[str, Any]) -> Iterator[str]:
    """The names of files in a manifest from elsewhere, whatever its shape."""
    hf = manifest.get("hf")
    files = hf.get("files") if isinstance(hf, dict) else None
    yield from files if isinstance(files, dict) else ()
    for key in ("gguf", "side_files"):
        records = manifest.get(key)
        for record in records if isinstance(records, list) else ():
            if not isinstance(record, dict):
                continue
            parts = record.get("parts")
            for name in (record.get("file"), *(parts if isinstance(parts, list) else ())):
                if isinstance(name, str):
                    yield name
