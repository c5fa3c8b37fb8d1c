from __future__ import annotations

import json
import logging
import os
import sys

import pytest

from reap2gguf.machine import Processes
from reap2gguf.progress import Silent
from reap2gguf.terminal import console
from reap2gguf.terminal.bars import Bars
from reap2gguf.terminal.console import (
    Detail,
    printing,
    quiet_libraries,
    say,
    say_json,
    terminal_progress,
)
from reap2gguf.terminal.lines import Lines


def test_a_pipe_and_a_dumb_terminal_get_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(terminal_progress(), Lines)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    assert isinstance(terminal_progress(), Bars)
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(terminal_progress(), Lines)


def test_no_color_is_respected(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    for value, expected in (("", "\x1b[32m+\x1b[0m fine\n"), ("1", "+ fine\n")):
        monkeypatch.setenv("NO_COLOR", value)
        say("fine", "result", prefix="\x1b[32m+\x1b[0m ")
        assert capsys.readouterr().out == expected


def test_long_results_break_between_words_on_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "  note: " + "words " * 30
    say(text, "result")
    assert capsys.readouterr().out == text + "\n", "a pipe gets one line"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "60")
    say(text, "result")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 2
    assert all(len(line) <= 60 for line in lines)
    assert all(line.startswith("    words") for line in lines[1:])


def test_libraries_are_quiet_unless_the_user_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("HF_HUB_VERBOSITY", "TRANSFORMERS_VERBOSITY", "HF_HUB_DISABLE_PROGRESS_BARS")
    for name in names:
        monkeypatch.setenv(name, "")  # so that it is restored at the end
        monkeypatch.delenv(name)
    monkeypatch.setenv("HF_DATASETS_DISABLE_PROGRESS_BARS", "0")
    monkeypatch.setattr(console, "_quieted", set())
    quiet_libraries()
    assert [os.environ[name] for name in names] == ["error", "error", "1"]
    assert os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] == "0"
    with printing(Detail.VERBOSE):
        assert [os.environ[name] for name in names] == ["warning", "warning", "1"]


@pytest.mark.parametrize(
    ("detail", "errors"),
    [
        (Detail.QUIET, "an error\nan alarm\n"),
        (Detail.NORMAL, "a note\nan error\nan alarm\n"),
        (Detail.VERBOSE, "a note\nan error\na detail\na warning\nan alarm\n"),
    ],
)
def test_results_go_to_stdout_and_the_rest_to_stderr(
    detail: Detail, errors: str, capsys: pytest.CaptureFixture[str]
) -> None:
    root, library = logging.getLogger(), logging.getLogger("some.library")
    before = (root.level, list(root.handlers))
    with printing(detail):
        say("a result", "result")
        say("a note")
        say("an error", "error")
        library.info("a detail")
        library.warning("a %s", "warning")
        library.error("an alarm")
        is_silent = isinstance(terminal_progress(), Silent)
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("a result\n", errors)
    assert is_silent is (detail is Detail.QUIET)
    assert (root.level, list(root.handlers)) == before


def test_text_of_files_stays_on_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    say("a\x1b[2J\nError: b", "result")
    say("c", "result", prefix="\x1b[32m+\x1b[0m ")
    say_json({"name": "a\x1b[2J\nb" * 900})
    first, second, *rest = capsys.readouterr().out.splitlines()
    assert first == "a\\x1b[2J\\nError: b"
    assert second.endswith(("+\x1b[0m c", "+ c"))
    assert json.loads("\n".join(rest)) == {"name": "a\x1b[2J\nb" * 900}


def test_only_the_first_of_several_processes_prints_results(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "processes", lambda: Processes(rank=1, local=1, size=2))
    say("a result", "result")
    say("a note")
    say_json({})
    say("an error", "error")
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "an error\n")
