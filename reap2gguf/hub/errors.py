"""What the errors of the Hub and of the network mean: a refusal, or a failure that may pass.

This is the only place that knows the error classes of huggingface_hub and of the HTTP client under
it. Models, datasets and pushes word the same `Problem`s each in their own way.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from enum import Enum, auto
from typing import cast

from reap2gguf.errors import OutputError, Reap2ggufError, SourceError

_BUSY = (408, 429)  # and every status from 500 on
_LONGEST_WAIT = 60.0  # seconds that a server may ask for
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG)
_PATH_ERRORS = (errno.EACCES, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG)


class Problem(Enum):
    """A reason why another try would fail like this one."""

    INVALID_NAME = auto()
    NO_TOKEN = auto()
    GATED = auto()
    NO_REPOSITORY = auto()  # or it is private
    NO_REVISION = auto()
    OFFLINE = auto()  # HF_HUB_OFFLINE is set
    REFUSED = auto()  # any other HTTP status that a retry does not change
    NOT_UNDERSTOOD = auto()  # an answer that is not the Hub's


def problem_of(error: BaseException) -> Problem | None:
    """What one error of the Hub says; None if a later try may succeed, or it says nothing."""
    from huggingface_hub import errors

    # a gated repository is for huggingface_hub a kind of missing one, so it comes first
    classes = (
        (errors.HFValidationError, Problem.INVALID_NAME),
        (errors.LocalTokenNotFoundError, Problem.NO_TOKEN),
        (errors.GatedRepoError, Problem.GATED),
        (errors.RepositoryNotFoundError, Problem.NO_REPOSITORY),
        (errors.RevisionNotFoundError, Problem.NO_REVISION),
        (errors.OfflineModeIsEnabled, Problem.OFFLINE),
    )
    for error_class, problem in classes:
        if isinstance(error, error_class):
            return problem
    status = status_of(error)
    if status is not None and not is_busy(status):
        return Problem.REFUSED
    if isinstance(error, errors.FileMetadataError):
        return Problem.NOT_UNDERSTOOD
    return None


def model_refusal(error: BaseException, name: str, revision: str | None) -> Reap2ggufError | None:
    """What to report if another try for a model would also fail; None if it may succeed."""
    for cause in causes(error):
        if refusal := cache_refusal(cause):
            return refusal
        if (problem := problem_of(cause)) is not None:
            return SourceError(f"{name}: {_words(problem, cause, name, revision)}")
    if isinstance(error, ValueError | LookupError):
        return SourceError(f"{name}: {_words(Problem.NOT_UNDERSTOOD, error, name, revision)}")
    return None


def _words(problem: Problem, error: BaseException, name: str, revision: str | None) -> str:
    return {
        Problem.INVALID_NAME: f"no such folder, and not a Hub name ({first_line(error)})",
        Problem.NO_TOKEN: "not logged in to the Hub: run `hf auth login`",
        Problem.GATED: "gated on the Hub; accept its terms there and run `hf auth login`",
        Problem.NO_REPOSITORY: (
            "no such folder here and no such repository on the Hub (or it is private: run `hf auth "
            "login`)"
        ),
        Problem.NO_REVISION: f"no revision {revision!r} on the Hub",
        Problem.OFFLINE: (
            "no such folder here, HF_HUB_OFFLINE is set, and the cache has no complete copy; unset "
            f"it, or run `hf download {name}` where there is a network"
        ),
        Problem.REFUSED: (
            f"the Hub refuses it (HTTP {status_of(error)}); check the name, the revision and, if "
            "it is private, `hf auth login`"
        ),
        Problem.NOT_UNDERSTOOD: (
            f"the Hub's answer is not understood ({first_line(error)}); check HF_ENDPOINT, and "
            "whether a proxy or a login page answers in its place"
        ),
    }[problem]


def cache_refusal(error: BaseException) -> OutputError | None:
    """What to report for an error of the cache's disk; None for an error of the network."""
    from huggingface_hub import constants

    # a firewall denies connections with the same number, but names no file
    is_disk = isinstance(error, OSError) and (
        error.errno in _DISK_ERRORS or (error.errno in _PATH_ERRORS and error.filename is not None)
    )
    # hf_xet writes files in Rust and passes no number on
    if is_disk or "No space left on device" in str(error):
        reason = getattr(error, "strerror", None) or first_line(error)
        return OutputError(
            f"{constants.HF_HUB_CACHE}: the Hub's cache cannot be written ({reason}); free space "
            "there, or set HF_HOME to a folder on another disk"
        )
    return None


def request_errors() -> tuple[type[Exception], ...]:
    """What huggingface_hub raises when a request goes wrong."""
    return (OSError, ValueError, RuntimeError, LookupError, _transport_error())


def is_transport(error: BaseException) -> bool:
    """Whether an error is the network's or the HTTP client's."""
    return isinstance(error, OSError | _transport_error())


def _transport_error() -> type[Exception]:
    from huggingface_hub.errors import HfHubHTTPError

    # whatever HTTP client this version of huggingface_hub is built on, its errors are of this class
    return cast("type[Exception]", HfHubHTTPError.__mro__[1])


def causes(error: BaseException) -> Iterator[BaseException]:
    """An error and the errors that it came from, the last one first."""
    cause: BaseException | None = error
    for _ in range(10):
        if cause is None:
            return
        yield cause
        cause = cause.__cause__ or cause.__context__


def status_of(error: BaseException) -> int | None:
    """The HTTP status of the answer that an error is about."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def is_offline(error: BaseException) -> bool:
    """Whether the user has set HF_HUB_OFFLINE."""
    return any(problem_of(cause) is Problem.OFFLINE for cause in causes(error))


def is_busy(status: int) -> bool:
    """Whether a status says that a later try may succeed."""
    return status in _BUSY or status >= 500


def reason_of(error: BaseException) -> str:
    """What went wrong on the way, in a few words."""
    chain = list(causes(error))
    status = next((found for cause in chain if (found := status_of(cause)) is not None), None)
    if status is not None:
        return f"HTTP {status}"
    # the first cause is the system's own word: connection refused, name not known
    return next(
        (line for cause in reversed(chain) if (line := first_line(cause))), "no reason given"
    )


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its class."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:160]


def requested_wait(error: BaseException) -> float:
    """The seconds that a busy server asks to wait (Retry-After), at most a minute."""
    for cause in causes(error):
        if status_of(cause) is not None:
            asked = cause.response.headers.get("Retry-After", "")  # type: ignore[attr-defined]
            return min(float(asked), _LONGEST_WAIT) if asked.isdecimal() else 0.0
    return 0.0
