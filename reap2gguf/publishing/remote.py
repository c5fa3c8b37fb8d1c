"""What a repository on the Hub holds, and what the Hub's refusals mean. Never writes."""

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
from reap2gguf.hub.errors import Problem, causes, is_busy, problem_of, status_of
from reap2gguf.hub.retry import Note, Retry, Sleep
from reap2gguf.messages import shown

if TYPE_CHECKING:
    from huggingface_hub import HfApi

    from reap2gguf.publishing.contents import PreparedFile

T = TypeVar("T")
_MOVED = 412  # another commit came first
_NO_SPACE = (402, 413, 507)
_XET_STATUS = re.compile(r"HTTP status client error \((4\d\d)\b")
_PIECE_BYTES = 2**22
_MAX_MESSAGE = 300


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository; only files in the large-file storage have a SHA-256."""

    n_bytes: int
    blob_id: str
    sha256: str | None


@dataclass(frozen=True)
class RemoteRepo:
    """A repository at one commit."""

    commit: str
    is_private: bool
    files: Mapping[str, RemoteFile]

    def holds(self, file: PreparedFile) -> bool:
        """Whether a file is there with the same bytes, by its hash."""
        found = self.files.get(file.name)
        if found is None or found.n_bytes != file.n_bytes:
            return False
        if found.sha256 is not None:
            return found.sha256 == file.sha256
        return found.blob_id == git_id(file)


def look_up(api: HfApi, repo: str) -> RemoteRepo | None:
    """What a repository holds at its newest commit; None if there is no such repository."""
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


def git_id(file: PreparedFile) -> str:
    """Git's hash of a file: SHA-1 over its size and its bytes, which are read 4 MiB at a time."""
    digest = hashlib.sha1(f"blob {file.n_bytes}\0".encode(), usedforsecurity=False)
    if isinstance(file.content, bytes):
        digest.update(file.content)
        return digest.hexdigest()
    with open_plain(file.content) as opened:
        while piece := opened.read(_PIECE_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def fetch_small(api: HfApi, repo: str, name: str, commit: str, max_bytes: int) -> bytes:
    """The bytes of a file as the Hub serves it, at most one more than `max_bytes`."""
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
            if len(found) > max_bytes:
                break
    return bytes(found[: max_bytes + 1])


def patiently(call: Callable[[], T], repo: str, note: Note, sleep: Sleep = time.sleep) -> T:
    """The result of a request to the Hub, repeated while its errors may pass.

    Raises PublishError if the Hub refuses, or does not answer in five tries.
    """
    advice = (
        "run the same command again when the network is back: committed files are not sent again"
    )

    def refuse(error: BaseException) -> PublishError | None:
        return refusal(error, repo)

    return Retry(repo, refuse, advice, note, sleep, error_class=PublishError).call(call)


def refusal(error: BaseException, repo: str) -> PublishError | None:
    """The error for the user if every retry would fail the same way; None if one may succeed."""
    for cause in causes(error):
        problem = problem_of(cause)
        if problem is Problem.NO_TOKEN:
            return PublishError("not logged in to the Hub: run `hf auth login`")
        if problem is Problem.OFFLINE:
            return PublishError(f"{repo}: HF_HUB_OFFLINE is set; unset it to publish")
        if isinstance(cause, OSError) and cause.filename is not None:
            return PublishError(
                f"{cause.filename}: cannot be read ({cause.strerror}); make it readable and run "
                "the same command again"
            )
        if isinstance(cause, PermissionError) and cause.errno is None:  # from hf_xet
            return _status_error(repo, 401, "")
        status = status_of(cause) or _status_in_text(cause)
        if status is None or status == _MOVED or (is_busy(status) and status not in _NO_SPACE):
            continue
        if problem is Problem.NO_REPOSITORY and status == 404:
            return PublishError(
                f"{repo}: the repository no longer exists, or the token has no access to "
                "it; run `hf auth login` with one that may write, or run the same command again"
            )
        return _status_error(repo, status, _message(cause))
    if isinstance(error, ValueError) and not isinstance(error, json.JSONDecodeError):
        # from huggingface_hub's own checks, or from the large-file storage
        if _is_about_space(str(error)):
            return _no_space(repo, _short_line(error))
        return PublishError(f"{repo}: the Hub does not accept it ({_short_line(error)})")
    return None


def _status_in_text(error: BaseException) -> int | None:
    """The HTTP status in an error message of hf_xet, which puts it nowhere else."""
    match = _XET_STATUS.search(str(error))
    return int(match[1]) if match else None


def _status_error(repo: str, status: int, message: str) -> PublishError:
    owner = repo.partition("/")[0]
    if status in _NO_SPACE or _is_about_space(message):
        return _no_space(repo, message or f"HTTP {status}")
    if status == 401:
        return PublishError(
            f"{repo}: the Hub does not accept the token (HTTP 401); run `hf auth login` again"
        )
    if status == 403:
        return PublishError(
            f"{repo}: no permission to write there (HTTP 403{', ' + message if message else ''}); "
            f"run `hf auth login` with a token that may write as {owner}, or pass another owner"
        )
    reason = f"HTTP {status}{', ' + message if message else ''}"
    return PublishError(f"{repo}: the Hub refuses it ({reason})")


def _is_about_space(message: str) -> bool:
    text = message.lower()
    return any(word in text for word in ("storage limit", "quota", "storage is full", "no space"))


def _no_space(repo: str, message: str) -> PublishError:
    return PublishError(
        f"{repo}: the Hub has no storage left for it ({message}); free or buy storage in the "
        "account's settings, or push without --private"
    )


def _message(error: Any) -> str:
    """The server's own message, in one short line."""
    return _short_line(getattr(error, "server_message", None) or "")


def _short_line(error: object) -> str:
    return " ".join(str(error).split())[:_MAX_MESSAGE]


def check_name(repo: str) -> None:
    """Raises PublishError if huggingface_hub does not accept a repository's name."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise PublishError(
            f"{shown(repo)}: not a valid repository name on the Hub ({_short_line(error)})"
        ) from error
    if repo.count("/") != 1:
        raise PublishError(f"{shown(repo)}: expected owner/name")
