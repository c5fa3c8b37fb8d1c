"""Sizes as they are typed."""

from __future__ import annotations

import pytest

from reap2gguf.terminal.option_types import read_size


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("12GiB", 12 * 2**30), ("12G", 12 * 2**30), ("12Gi", 12 * 2**30), ("12GB", 12 * 10**9),
        ("12gb", 12 * 10**9), (" 1.5 KiB ", 1536), ("7B", 7), ("2T", 2 * 2**40), ("3MB", 3 * 10**6),
    ],
)  # fmt: skip
def test_sizes(text: str, n_bytes: int) -> None:
    assert read_size(text) == n_bytes


@pytest.mark.parametrize("text", ["8", "0", " 900000 ", "1.5"])
def test_a_size_without_a_unit(text: str) -> None:
    number = text.strip()
    with pytest.raises(ValueError, match=rf"^{number} has no unit; write {number}GiB$"):
        read_size(text)


@pytest.mark.parametrize("text", ["", "GiB", "8iB", "-1G", "1e9GB", "8 apples", "8Gx"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size such as 12GiB"):
        read_size(text)


def test_a_size_beyond_all_disks() -> None:
    with pytest.raises(ValueError, match="is too large, expected at most 1024 PiB"):
        read_size("2000000T")
