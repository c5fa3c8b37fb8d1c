from __future__ import annotations

import json
import logging

import pytest

from reap2gguf.machine import Processes
from reap2gguf.progress import Silent
from reap2gguf.terminal import console
from reap2gguf.terminal.bars import Bars
from reap2gguf.terminal.console import Detail, Lines, printing, say, say_json, terminal_progress


def test_without_a_terminal_there_are_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "_LINE_SECONDS", 0.0)
    progress = terminal_progress()
    assert isinstance(progress, Lines)
    with progress.task("Reading", 10, "rows") as task:
        task.advance(5)
    progress.note("a note")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Reading: 10 rows"
    assert lines[1].startswith("Reading: 50%, 5 rows, ")
    assert lines[1].endswith(" left")
    assert lines[2].startswith("Reading: done in ")
    assert lines[3] == "a note"


def test_bars_finish(capsys: pytest.CaptureFixture[str]) -> None:
    with Bars().task("Reading", 2, "rows") as task:
        task.advance()
        task.advance()
    assert "100%" in capsys.readouterr().err


def test_verbose_bars_leave_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    with Bars(is_verbose=True).task("Reading", 2, "rows") as task:
        task.advance(2)
    assert "Reading: 2 rows in " in capsys.readouterr().err


def test_bars_of_tasks_at_the_same_time(capsys: pytest.CaptureFixture[str]) -> None:
    bars = Bars()
    with bars.task("Fetching", 1, "bytes") as fetching:
        with bars.task("Observing", 4, "tokens") as observing:
            observing.advance(4)
            bars.note("a line between")
        fetching.advance()
    with bars.task("Writing", 1, "bytes") as writing:
        writing.advance()
    shown = capsys.readouterr().err
    for title in ("Fetching", "Observing", "Writing"):
        assert any(title in line and "100%" in line for line in shown.splitlines()), shown
    assert "a line between" in shown


@pytest.mark.parametrize(
    ("detail", "errors"),
    [
        (Detail.QUIET, "an error\n"),
        (Detail.NORMAL, "a note\nan error\na warning\n"),
        (Detail.VERBOSE, "a note\nan error\na detail\na warning\n"),
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
