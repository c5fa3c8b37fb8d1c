"""Whether a push may write to a repository, and which files of an earlier push it removes."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reap2gguf.atomic import write_whole
from reap2gguf.bundle.layout import CARD_FILE, HUB_FILES, MANIFEST_FILE, SUMS_FILE
from reap2gguf.bundle.sums import parse_sums
from reap2gguf.checkpoint.config import read_json
from reap2gguf.errors import CheckpointError, PublishError
from reap2gguf.gguf_files.part_names import parse_part_name
from reap2gguf.messages import shown
from reap2gguf.publishing.remote import RemoteRepo, fetch_small, look_up, patiently

if TYPE_CHECKING:
    from huggingface_hub import HfApi

    from reap2gguf.hub.retry import Sleep
    from reap2gguf.progress import Progress
    from reap2gguf.publishing.contents import PreparedRepo

_MAX_BYTES = 2**26  # of a manifest
_STATE_FILE = "repositories.json"
Fetch = Callable[[str, str, int], bytes]  # a small file by its name, commit and size


def check_login(api: HfApi, repo: str, progress: Progress, sleep: Sleep = time.sleep) -> None:
    """Raises PublishError unless there is a token that may write as the repository's owner."""
    check_owner(patiently(api.whoami, repo, progress.note, sleep), repo)


def check_owner(identity: dict[str, Any], repo: str) -> None:
    """Raises PublishError if a token is not the owner's or a member's, or may only read.

    `identity` is what the Hub answers about the token.
    """
    owner = repo.partition("/")[0]
    organizations = identity.get("orgs") or ()
    names = [str(identity.get("name")), *(str(org.get("name")) for org in organizations)]
    if owner.lower() not in (name.lower() for name in names):
        raise PublishError(
            f"{repo}: the token belongs to {shown(identity.get('name'))}, who is neither {owner} "
            f"nor in an organization of that name; publish as one of "
            f"{', '.join(map(shown, names))}, or run `hf auth login`"
        )
    role = ((identity.get("auth") or {}).get("accessToken") or {}).get("role")
    if role == "read":
        raise PublishError(
            f"{repo}: the token may only read; run `hf auth login` with one that may write"
        )


def check_visibility(
    api: HfApi,
    repo: str,
    private: bool,
    progress: Progress,
    sleep: Sleep = time.sleep,
) -> None:
    """`refuse_public` for what the Hub holds."""
    remote = patiently(lambda: look_up(api, repo), repo, progress.note, sleep)
    refuse_public(repo, remote, private)


def refuse_public(repo: str, remote: RemoteRepo | None, private: bool) -> None:
    """Raises PublishError if --private is asked for a repository that is public."""
    if remote is not None and private and not remote.is_private:
        raise PublishError(
            f"{repo}: exists and is public; make it private in its settings, push without "
            "--private, or pass another name"
        )


class AcceptedRepos:
    """The repositories that a push may write to, remembered for when it is resumed."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / _STATE_FILE

    def names(self) -> list[str]:
        try:
            names = read_json(self._path).get("accepted")
        except CheckpointError:
            return []  # no push has begun, or the file is damaged: they are looked at again
        return names if isinstance(names, list) else []

    def add(self, repo: str) -> None:
        write_whole(self._path, json.dumps({"accepted": sorted({*self.names(), repo})}))


def admit(
    api: HfApi,
    prepared: PreparedRepo,
    accepted: AcceptedRepos,
    progress: Progress,
    sleep: Sleep = time.sleep,
) -> list[str]:
    """Check that a repository may be written to, and remember it; the files to remove from it.

    Raises PublishError if the repository holds somebody else's work.
    """
    repo, note = prepared.repo, progress.note
    remote = patiently(lambda: look_up(api, repo), repo, note, sleep)

    def fetch(name: str, commit: str, n_bytes: int) -> bytes:
        return patiently(lambda: fetch_small(api, repo, name, commit, n_bytes), repo, note, sleep)

    outdated = files_to_remove(prepared, remote, fetch, repo in accepted.names())
    accepted.add(repo)
    return outdated


def files_to_remove(
    prepared: PreparedRepo, remote: RemoteRepo | None, fetch: Fetch, is_accepted: bool
) -> list[str]:
    """The files that a push removes from a repository.

    These are the files that the manifest there names and this bundle does not have, and other parts
    of the same GGUF files; all other files remain. Raises PublishError if the push may not write
    there. It may if there is no such repository, if the manifest there has this bundle's name, if
    an interrupted run of this push has written there, or if it would overwrite no file.
    """
    if remote is None:
        return []
    earlier = _earlier_files(prepared, remote, fetch)
    if earlier is None and not is_accepted:
        replaceable = {CARD_FILE, *HUB_FILES}
        for file in prepared.files:
            exists = file.name in remote.files and file.name not in replaceable
            if exists and not remote.holds(file):
                raise PublishError(
                    f"{prepared.repo}: holds a different {file.name} and is not an earlier push of "
                    f"{prepared.manifest.name}; pass another repository, or empty that one"
                )
    return _outdated_files(prepared, remote, earlier or ())


def _earlier_files(prepared: PreparedRepo, remote: RemoteRepo, fetch: Fetch) -> set[str] | None:
    """The files that an earlier push listed; None if the repository has no manifest.

    Raises PublishError if the manifest is that of another bundle.
    """

    def read(name: str) -> bytes:
        file = remote.files.get(name)
        if file is None or file.n_bytes > _MAX_BYTES:
            return b""
        return fetch(name, remote.commit, file.n_bytes)

    if MANIFEST_FILE not in remote.files:
        return None
    try:
        values = json.loads(read(MANIFEST_FILE))
    except (ValueError, RecursionError):
        values = None  # refused below, as a bundle without a name
    name = values.get("name") if isinstance(values, dict) else None
    if name != prepared.manifest.name:
        raise PublishError(
            f"{prepared.repo}: holds the bundle {shown(name)}, this one is "
            f"{prepared.manifest.name}; pass another repository"
        )
    hashes, _ = parse_sums(read(SUMS_FILE).decode("utf-8", "replace"))
    return {*_named_files(values), *hashes}


def _outdated_files(
    prepared: PreparedRepo, remote: RemoteRepo, earlier: Collection[str]
) -> list[str]:
    """Files in a repository that an earlier push put there and this one does not have."""
    own = set(earlier)
    gguf_files = {record.file for record in prepared.manifest.gguf}
    for name in remote.files:
        part = parse_part_name(name)
        if name in gguf_files or (part is not None and f"{part.stem}.gguf" in gguf_files):
            own.add(name)
    current = {file.name for file in prepared.files} | HUB_FILES
    return sorted(own & remote.files.keys() - current)


def _named_files(manifest: dict[str, Any]) -> Iterator[str]:
    """The file names in a manifest from the Hub, which may have any shape."""
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
