"""What the Hub's and the network's errors mean: a refusal, or trouble that may pass."""

from __future__ import annotations

import errno
from collections.abc import Iterator

from reap2gguf.errors import OutputError, Reap2ggufError, SourceError

_BUSY = (408, 429)  # and all from 500 on
_LONGEST_WAIT = 60.0  # seconds that a server may ask for
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG)
_PATH_ERRORS = (errno.EACCES, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG)


def refusal(error: BaseException, name: str, revision: str | None) -> Reap2ggufError | None:
    """What to tell the user if another try would fail as this one did; None if it may not."""
    from huggingface_hub.errors import (
        FileMetadataError,
        GatedRepoError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    for cause in causes(error):
        if refusal := _disk_refusal(cause):
            return refusal
        if isinstance(cause, HFValidationError):
            return SourceError(f"{name}: no such folder, and not a Hub name ({first_line(cause)})")
        if isinstance(cause, GatedRepoError):
            return SourceError(
                f"{name}: gated on the Hub; accept its terms there and run `hf auth login`"
            )
        if isinstance(cause, RepositoryNotFoundError):
            return SourceError(
                f"{name}: no such folder here and no such repository on the Hub (or it is "
                "private: run `hf auth login`)"
            )
        if isinstance(cause, RevisionNotFoundError):
            return SourceError(f"{name}: no revision {revision!r} on the Hub")
        if isinstance(cause, OfflineModeIsEnabled):
            return SourceError(
                f"{name}: no such folder here, HF_HUB_OFFLINE is set, and the cache has no whole "
                f"copy; unset it, or run `hf download {name}` where there is a network"
            )
        status = status_of(cause)
        if status is not None and not is_busy(status):
            return SourceError(
                f"{name}: the Hub refuses it (HTTP {status}); check the name, the revision and, "
                "if it is private, `hf auth login`"
            )
        if isinstance(cause, FileMetadataError):
            return _not_understood(name, cause)
    if isinstance(error, ValueError | LookupError):
        return _not_understood(name, error)
    return None


def _not_understood(name: str, error: BaseException) -> SourceError:
    return SourceError(
        f"{name}: the Hub's answer is not understood ({first_line(error)}); check HF_ENDPOINT, and "
        "whether a proxy or a login page answers in its place"
    )


def _disk_refusal(error: BaseException) -> OutputError | None:
    """An error of the cache's disk, and not of the network."""
    from huggingface_hub import constants

    # a firewall denies connections as a folder denies files, but of no file
    of_disk = isinstance(error, OSError) and (
        error.errno in _DISK_ERRORS or (error.errno in _PATH_ERRORS and error.filename is not None)
    )
    # hf_xet writes files in Rust and hands on no number
    if of_disk or "No space left on device" in str(error):
        reason = getattr(error, "strerror", None) or first_line(error)
        return OutputError(
            f"{constants.HF_HUB_CACHE}: the Hub's cache cannot be written ({reason}); make room "
            "there, or set HF_HOME to a folder on another disk"
        )
    return None


def causes(error: BaseException) -> Iterator[BaseException]:
    """An error and what it came from, the last first."""
    cause: BaseException | None = error
    for _ in range(10):
        if cause is None:
            return
        yield cause
        cause = cause.__cause__ or cause.__context__


def status_of(error: BaseException) -> int | None:
    """The HTTP status that an error is about."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def is_offline(error: BaseException) -> bool:
    """Whether the user wants no network to be asked."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    return any(isinstance(cause, OfflineModeIsEnabled) for cause in causes(error))


def is_busy(status: int) -> bool:
    """Whether a status says that a later try may fare better."""
    return status in _BUSY or status >= 500


def trouble(error: BaseException) -> str:
    """What went wrong on the way, in a few words."""
    chain = list(causes(error))
    status = next((found for cause in chain if (found := status_of(cause)) is not None), None)
    if status is not None:
        return f"HTTP {status}"
    # the deepest is the system's own word: connection refused, name not known
    return next(
        (line for cause in reversed(chain) if (line := first_line(cause))), "no reason given"
    )


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its kind."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:160]


def asked_wait(error: BaseException) -> float:
    """The seconds that a busy server asks to be left alone, up to a minute."""
    for cause in causes(error):
        if status_of(cause) is not None:
            asked = cause.response.headers.get("Retry-After", "")  # type: ignore[attr-defined]
            return min(float(asked), _LONGEST_WAIT) if asked.isdecimal() else 0.0
    return 0.0
