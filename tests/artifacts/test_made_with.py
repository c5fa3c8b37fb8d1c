"""Versions beside a result, and what is said where others reuse it."""

from __future__ import annotations

import pytest

from reap2gguf import __version__
from reap2gguf.artifacts.made_with import (
    COMPUTING,
    computing,
    decode,
    encode,
    other_versions,
    versions,
)

MADE = {"reap2gguf": "0.1.0", "torch": "2.13.0", "transformers": "5.0.0"}
NEWER = "reap2gguf 1, torch 3 and transformers 6"


def test_versions_are_those_that_are_installed() -> None:
    found = versions([*COMPUTING, "no-such-library"])
    assert found["reap2gguf"] == __version__
    assert {"torch", "transformers"} <= found.keys()
    assert "no-such-library" not in found
    assert decode(encode(found)) == found
    assert computing(found) == {k: v for k, v in found.items() if k != "reap2gguf"}


@pytest.mark.parametrize(
    ("now", "said"),
    [
        ({}, ""),
        ({"torch": "2.14.0"}, "made with torch 2.13.0, now 2.14.0"),
        (
            {"torch": "2.14.0", "reap2gguf": "0.2.0"},
            "made with reap2gguf 0.1.0 and torch 2.13.0, now reap2gguf 0.2.0 and torch 2.14.0",
        ),
        (
            {"flash-linear-attention": "0.4"},
            "made with no flash-linear-attention, now flash-linear-attention 0.4",
        ),
        (
            {"reap2gguf": "1", "torch": "3", "transformers": "6"},
            f"made with reap2gguf 0.1.0, torch 2.13.0 and transformers 5.0.0, now {NEWER}",
        ),
    ],
)
def test_what_differs_is_said(now: dict[str, str], said: str) -> None:
    assert other_versions(MADE, MADE | now) == said


def test_a_library_that_is_gone_is_said() -> None:
    made = {**MADE, "flash-linear-attention": "0.4"}
    said = "made with flash-linear-attention 0.4, now no flash-linear-attention"
    assert other_versions(made, MADE) == said


def test_versions_that_were_not_recorded_differ_from_nothing() -> None:
    assert other_versions({}, MADE) == ""
