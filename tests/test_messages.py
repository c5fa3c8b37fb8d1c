from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import Any

import pytest

from reap2gguf.messages import (
    duration,
    one_line,
    parameters,
    quantity,
    shell_word,
    shown,
    size,
    without_password,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain, with spaces and ümläute", "plain, with spaces and ümläute"),
        ("a\nb\r\tc", "a\\nb\\r\\tc"),
        ("\x1b[2J\x00", "\\x1b[2J\\x00"),
        ("right\u202eleft", "right\\u202eleft"),
        ("half \ud800", "half \\ud800"),
        ("\U0001f600", "\U0001f600"),
    ],
)
def test_one_line(text: str, expected: str) -> None:
    assert one_line(text) == expected


@pytest.mark.parametrize("letter", ["x", "\n", "\x1b", "\u202e", "\U000e0001"])
def test_a_long_line_keeps_its_ends(letter: str) -> None:
    found = one_line("begin " + letter * 10**6 + " end")
    assert found.startswith("begin ")
    assert found.endswith(" end")
    assert "letters left out" in found
    assert found.isprintable()
    assert len(found) < 1700


@pytest.mark.parametrize(
    ("value", "expected"), [(5, "5"), ("a\nb", "'a\\nb'"), (None, "None"), ([1, "a"], "[1, 'a']")]
)
def test_short_values_are_shown_whole(value: Any, expected: str) -> None:
    assert shown(value) == expected


@pytest.mark.parametrize("value", ["a" * 10**6, [0] * 10**6, [["a" * 999] * 99] * 99, 10**4000])
def test_long_values_are_cut(value: Any) -> None:
    assert len(shown(value)) < 12_000


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (size(0), "0 bytes"),
        (size(1023), "1023 bytes"),
        (size(1536), "1.50 KiB"),
        (size(2**20), "1.00 MiB"),
        (size(50 * 10**9), "46.57 GiB"),
        (size(2**41), "2.00 TiB"),
        (parameters(999_949), "1.0 M"),
        (parameters(10**9), "1.00 B"),
        (quantity(None, "rows"), "? rows"),
        (quantity(7, "rows"), "7 rows"),
        (quantity(2_500, "tokens"), "2.5 k tokens"),
        (quantity(3e9, "tokens"), "3.0 G tokens"),
        (quantity(2**30, "bytes"), "1.00 GiB"),
        (duration(89), "89 s"),
        (duration(90), "2 min"),
        (duration(7200), "2.0 h"),
        (duration(172_799), "48.0 h"),
        (duration(412_000), "4 d 18 h"),
    ],
)
def test_numbers_have_the_unit_that_fits(text: str, expected: str) -> None:
    assert text == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://me:pw@host/a: no such folder", "https://...@host/a: no such folder"),
        ("http://pw@host and ftp://a:b@c/d", "http://...@host and ftp://...@c/d"),
        ("https://me:p@w@host/a", "https://...@host/a"),
        ("https://host/a?token=pw&x=1: no", "https://host/a?... no"),
        ("https://huggingface.co/owner/name", "https://huggingface.co/owner/name"),
        ("owner/name@revision, me@host", "owner/name@revision, me@host"),
        ("is this right? /a/b@c", "is this right? /a/b@c"),
    ],
)
def test_passwords_are_left_out(text: str, expected: str) -> None:
    assert without_password(text) == expected


@pytest.mark.parametrize("piece", ["@", "a://", "a://@", "x", "a://b@", "://", "?"])
def test_a_hostile_line_is_searched_in_little_time(piece: str) -> None:
    begun = time.process_time()
    without_password("a://" + piece * 200_000)
    assert time.process_time() - begun < 5


@pytest.mark.parametrize(
    "path", ["out/NAME-GGUF", "out dir/x", "x'y", "-lead/x", "--", "$(id)", "a;b", "模型", "", "~x"]
)
def test_a_path_in_a_command_is_one_word(path: str) -> None:
    (word,) = shlex.split(shell_word(path))
    assert word.removeprefix("./") == path
    assert not word.startswith("-")
    assert shell_word(Path("a b")) == "'a b'"
