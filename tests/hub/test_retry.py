"""One policy of retries: waits, notes, refusals and the last error."""

from __future__ import annotations

from typing import Any

import pytest

from reap2gguf.errors import CalibrationError, Reap2ggufError, SourceError
from reap2gguf.hub.retry import TRIES, Retry


class Request:
    """Fails as often as it is told, then succeeds."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.notes: list[str] = []
        self.waits: list[float] = []

    def __call__(self) -> str:
        if self.errors:
            raise self.errors.pop(0)
        return "done"

    def run(self, refusal: Any = lambda error: None, **named: Any) -> str:
        retry = Retry("owner/name", refusal, "do this", self.notes.append, self.waits.append)
        for name, value in named.items():
            object.__setattr__(retry, name, value)
        return retry.call(self)


def test_a_success_is_returned_at_once() -> None:
    request = Request()
    assert request.run() == "done"
    assert (request.notes, request.waits) == ([], [])


def test_waits_double_and_are_never_the_same() -> None:
    request = Request(*[ConnectionError("refused")] * (TRIES - 1))
    assert request.run() == "done"
    for base, wait in zip((1, 2, 4, 8), request.waits, strict=True):
        assert base <= wait <= 1.25 * base
    assert request.waits != [1, 2, 4, 8]
    assert request.notes == [
        f"owner/name: the Hub cannot be reached (refused); try {n} of 5 in {wait:.0f} s"
        for n, wait in enumerate(request.waits, start=2)
    ]


def test_the_last_error_says_what_to_do() -> None:
    request = Request(*[ConnectionError("refused")] * 3)
    message = r"^owner/name: the Hub cannot be reached in 3 tries \(refused\); do this$"
    with pytest.raises(CalibrationError, match=message):
        request.run(tries=3, error_class=CalibrationError)
    assert len(request.waits) == 2


def test_a_refusal_is_not_repeated() -> None:
    def refusal(error: BaseException) -> Reap2ggufError | None:
        return SourceError("no") if str(error) == "final" else None

    request = Request(ConnectionError("refused"), ValueError("final"))
    with pytest.raises(SourceError, match=r"^no$") as caught:
        request.run(refusal)
    assert isinstance(caught.value.__cause__, ValueError)
    assert len(request.waits) == 1


def test_other_errors_are_not_caught() -> None:
    with pytest.raises(TypeError, match="a bug"):
        Request(TypeError("a bug")).run()
    assert Request(TypeError("a bug")).run(errors=lambda: (TypeError,)) == "done"
