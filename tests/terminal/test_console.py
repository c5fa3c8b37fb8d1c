from __future__ import annotations

import pytest

from reap2gguf.terminal import console
from reap2gguf.terminal.bars import Bars
from reap2gguf.terminal.console import Lines, terminal_progress


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
