"""What a repository on the Hub holds, and what the Hub's refusals mean. Reads, never writes."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from reap2gguf.errors import PublishError
from reap2gguf.files import open_plain
from reap2gguf.hub.errors import causes, is_busy, status_of
from reap2gguf.hub.snapshot import Note, Sleep, persist
from reap2gguf.messages import shown
from reap2gguf.publishing.staging import StagedFile

if TYPE_CHECKING:
    from huggingface_hub import HfApi

T = TypeVar("T")
_MOVED = 412  # another commit came first
_FULL = (402, 413, 507)
_XET_STATUS = re.compile(r"HTTP status client error \((4\d\d)\b")
_PIECE_BYTES = 2**22
_MAX_MESSAGE = 300


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository; it has a SHA-256 if it lies in the large-file storage."""

    n_bytes: int
    blob_id: str
    sha256: str | None


@dataclass(frozen=True)
class RemoteRepo:
    """A repository at one commit."""

    commit: str
    is_private: bool
    files: Mapping[str, RemoteFile]

    def holds(self, file: StagedFile) -> bool:
        """Whether a file is there with the same bytes, by its hash."""
        found = self.files.get(file.name)
        if found is None or found.n_bytes != file.n_bytes:
            return False
        if found.sha256 is not None:
            return found.sha256 == file.sha256
        return found.blob_id == git_id(file)


def look(api: HfApi, repo: str) -> RemoteRepo | None:
    """What the repository holds at its newest commit; None if there is no such repository."""
    from huggingface_hub import RepoFile
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        info = api.model_info(repo)
    except GatedRepoError:
        raise
    except RepositoryNotFoundError:
        return None
    commit = str(info.sha)
    files = {
        entry.path: RemoteFile(entry.size, entry.blob_id, entry.lfs.sha256 if entry.lfs else None)
        for entry in api.list_repo_tree(repo, recursive=True, revision=commit)
        if isinstance(entry, RepoFile)
    }
    return RemoteRepo(commit, bool(info.private), files)


def git_id(file: StagedFile) -> str:
    """The hash by which git knows a file: SHA-1 over its size and its bytes, read piecewise."""
    digest = hashlib.sha1(f"blob {file.n_bytes}\0".encode(), usedforsecurity=False)
    if isinstance(file.content, bytes):
        digest.update(file.content)
        return digest.hexdigest()
    with open_plain(file.content) as opened:
        while piece := opened.read(_PIECE_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def fetch_small(api: HfApi, repo: str, name: str, commit: str, most_bytes: int) -> bytes:
    """The bytes of a file as the Hub hands it out, at most one more than `most_bytes`."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        build_hf_headers,
        get_session,
        hf_raise_for_status,
    )

    url = hf_hub_url(repo, name, revision=commit, endpoint=api.endpoint)
    found = bytearray()
    headers = build_hf_headers()
    with get_session().stream("GET", url, headers=headers, follow_redirects=True) as response:
        hf_raise_for_status(response)
        for piece in response.iter_bytes():
            found += piece
            if len(found) > most_bytes:
                break
    return bytes(found[: most_bytes + 1])


def patiently(call: Callable[[], T], repo: str, note: Note, sleep: Sleep = time.sleep) -> T:
    """Call, and call again where the Hub or the way to it fails for a while.

    Raises PublishError if the Hub refuses, or in five tries does not answer.
    """
    advice = (
        "run the same command again where there is a network: what is committed is not sent twice"
    )

    def refuse(error: BaseException) -> PublishError | None:
        return refusal(error, repo)

    return persist(repo, None, call, note, sleep, advice=advice, refuse=refuse, kind=PublishError)


def refusal(error: BaseException, repo: str) -> PublishError | None:
    """What to tell the user if another try would fail as this one did; None if it may not."""
    from huggingface_hub.errors import (
        LocalTokenNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    for cause in causes(error):
        if isinstance(cause, LocalTokenNotFoundError):
            return PublishError("not logged in to the Hub: run `hf auth login`")
        if isinstance(cause, OfflineModeIsEnabled):
            return PublishError(f"{repo}: HF_HUB_OFFLINE is set; unset it to publish")
        if isinstance(cause, OSError) and cause.filename is not None:
            return PublishError(
                f"{cause.filename}: cannot be read ({cause.strerror}); nothing else is at fault, "
                "run the same command again once it can be"
            )
        if isinstance(cause, PermissionError) and cause.errno is None:  # as hf_xet has it
            return _of_status(repo, 401, "")
        status = status_of(cause) or _status_in(cause)
        if status is None or status == _MOVED or (is_busy(status) and status not in _FULL):
            continue
        if isinstance(cause, RepositoryNotFoundError) and status == 404:
            return PublishError(
                f"{repo}: no such repository on the Hub any more, or the token may not see it; run "
                "`hf auth login` with one that may write, or run the command again to make it"
            )
        return _of_status(repo, status, _message(cause))
    if isinstance(error, ValueError) and not isinstance(error, json.JSONDecodeError):
        # huggingface_hub's own checks, and the large-file storage's refusals
        return (
            _full(repo, _line(error))
            if _speaks_of_room(str(error))
            else PublishError(f"{repo}: the Hub does not take it ({_line(error)})")
        )
    return None


def _status_in(error: BaseException) -> int | None:
    """The HTTP status in the words of hf_xet, which has no other place for it."""
    match = _XET_STATUS.search(str(error))
    return int(match[1]) if match else None


def _of_status(repo: str, status: int, message: str) -> PublishError:
    owner = repo.partition("/")[0]
    if status in _FULL or _speaks_of_room(message):
        return _full(repo, message or f"HTTP {status}")
    if status == 401:
        return PublishError(
            f"{repo}: the Hub does not accept the token (HTTP 401); run `hf auth login` again"
        )
    if status == 403:
        return PublishError(
            f"{repo}: no right to write there (HTTP 403{', ' + message if message else ''}); run "
            f"`hf auth login` with a token that may write as {owner}, or name an owner that you are"
        )
    told = f"HTTP {status}{', ' + message if message else ''}"
    return PublishError(f"{repo}: the Hub refuses it ({told})")


def _speaks_of_room(message: str) -> bool:
    text = message.lower()
    return any(word in text for word in ("storage limit", "quota", "storage is full", "no space"))


def _full(repo: str, message: str) -> PublishError:
    return PublishError(
        f"{repo}: the Hub has no room for it ({message}); free storage or buy some in the "
        "settings of the account, or publish without --private"
    )


def _message(error: Any) -> str:
    """What the server said, in one short line."""
    return _line(getattr(error, "server_message", None) or "")


def _line(error: object) -> str:
    return " ".join(str(error).split())[:_MAX_MESSAGE]


def check_name(repo: str) -> None:
    """Refuse what huggingface_hub takes for no name of a repository; PublishError says why."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise PublishError(f"{shown(repo)}: no name on the Hub ({_line(error)})") from error
    if repo.count("/") != 1:
        raise PublishError(f"{shown(repo)}: expected owner/name")
