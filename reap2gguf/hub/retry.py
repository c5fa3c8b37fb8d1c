"""Repeats a request to the Hub while its errors may be temporary; one loop for every request.

Five tries by default. The first wait is one second and doubles after each try; up to a quarter is
added at random, so that many clients do not come back at the same moment. A server that asks for a
longer wait gets it, up to a minute. Each failed try is one note to the user.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from reap2gguf.errors import Reap2ggufError, SourceError
from reap2gguf.hub.errors import model_refusal, reason_of, request_errors, requested_wait

TRIES = 5
_FIRST_WAIT = 1.0  # seconds
_JITTER = random.Random()

Note = Callable[[str], None]  # receives one line for the user
Sleep = Callable[[float], None]
T = TypeVar("T")


def ignore_note(text: str) -> None:
    """A Note that does nothing."""


@dataclass(frozen=True)
class Retry:
    """How one kind of request is repeated, and how its failures are reported."""

    subject: str  # how notes and errors begin, such as "owner/name"
    refusal: Callable[[BaseException], Reap2ggufError | None]  # None: the error may pass
    advice: str  # the end of the last error
    note: Note = ignore_note
    sleep: Sleep = time.sleep
    tries: int = TRIES
    error_class: type[Reap2ggufError] = SourceError  # of the last error
    errors: Callable[[], tuple[type[Exception], ...]] = request_errors  # those that are caught

    def call(self, request: Callable[[], T]) -> T:
        """The result of `request`.

        Raises what `refusal` returns for an error that no retry changes, and `error_class` if the
        last try fails too.
        """
        wait = _FIRST_WAIT
        for attempt in range(1, self.tries + 1):
            try:
                return request()
            except self.errors() as error:
                if refused := self.refusal(error):
                    raise refused from error
                reason = reason_of(error)
                if attempt == self.tries:
                    raise self.error_class(
                        f"{self.subject}: the Hub cannot be reached in {self.tries} tries "
                        f"({reason}); {self.advice}"
                    ) from error
                seconds = max(wait * _JITTER.uniform(1, 1.25), requested_wait(error))
                self.note(
                    f"{self.subject}: the Hub cannot be reached ({reason}); try {attempt + 1} of "
                    f"{self.tries} in {seconds:.0f} s"
                )
                self.sleep(seconds)
                wait *= 2
        raise AssertionError("the last try returns or raises")


def model_retry(
    name: str,
    revision: str | None,
    note: Note = ignore_note,
    sleep: Sleep = time.sleep,
    tries: int = TRIES,
    advice: str = "",
) -> Retry:
    """How requests for a model are repeated; raises SourceError or OutputError."""
    advice = advice or (
        "check the name (there is no such folder here) and the network, or download it on another "
        f"machine (`hf download {name}`) and pass the folder, or copy the cache and set "
        "HF_HUB_OFFLINE=1"
    )

    def refusal(error: BaseException) -> Reap2ggufError | None:
        return model_refusal(error, name, revision)

    return Retry(name, refusal, advice, note, sleep, tries)
