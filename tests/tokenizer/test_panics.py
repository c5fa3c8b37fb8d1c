from __future__ import annotations

import os
from typing import Any

import pytest

from reap2gguf.errors import CheckpointError
from reap2gguf.tokenizer.panics import panics_as


class Panic(BaseException):
    """What pyo3 raises is no Exception either."""


def fail(error: BaseException) -> None:
    """What a Rust library does that panics: it writes to the descriptor, then raises."""
    with panics_as(CheckpointError, "there"):
        os.write(2, b"thread panicked at ...\nstack backtrace:\n")
        raise error


def test_a_panic_is_one_error_and_silent(capfd: Any) -> None:
    with pytest.raises(CheckpointError, match=r"^there \(index out of bounds, more\)$"):
        fail(Panic("index out of bounds,\n  more"))
    os.write(2, b"heard again")
    assert capfd.readouterr().err == "heard again"


def test_an_error_without_words_is_named() -> None:
    with pytest.raises(CheckpointError, match=r"there \(KeyError\(\)\)"):
        fail(KeyError())


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, CheckpointError])
def test_what_is_no_panic_goes_through(error: type[BaseException]) -> None:
    with pytest.raises(error, match="own"):
        fail(error("own"))
