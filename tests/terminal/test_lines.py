"""Progress in a pipe: few lines, each with the time of day."""

from __future__ import annotations

import contextlib
import re
import threading

import pytest

from reap2gguf.terminal import lines, meter
from reap2gguf.terminal.console import say
from reap2gguf.terminal.lines import Lines
from tests.terminal.test_meter import Clock

_CLOCK = re.compile(r"\d\d:\d\d:\d\d ")


def printed(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What was printed, without the time of day that each line begins with."""
    found = capsys.readouterr().err.splitlines()
    assert all(_CLOCK.match(line) for line in found)
    return [_CLOCK.sub("", line, count=1) for line in found]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(meter, "time", clock)
    monkeypatch.setattr(lines.time, "monotonic", clock.monotonic)
    return clock


def run(clock: Clock, n_steps: int, seconds: float, is_verbose: bool = False) -> None:
    with Lines(say, is_verbose=is_verbose).task("Observing experts", n_steps, "tokens") as task:
        for step in range(n_steps):
            task.at(f"layer {step + 1}/{n_steps}")
            clock.now += seconds / n_steps
            task.advance()


def test_a_short_task_is_a_begin_and_an_end(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    run(clock, 1000, 50.0)
    assert printed(capsys) == [
        "Observing experts: 1.0 k tokens",
        "Observing experts: done in 50 s",
    ]


def test_three_hours_are_about_fifty_lines(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    run(clock, 5000, 3 * 3600.0)
    found = printed(capsys)
    assert 45 <= len(found) <= 60
    assert re.fullmatch(r"Observing experts: 50%, layer 25\d\d/5000, (89|90) min left", found[25])


def test_ten_minutes_are_a_line_a_minute(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    run(clock, 100, 600.0)
    assert 10 <= len(printed(capsys)) <= 12


def test_verbose_prints_more(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    run(clock, 100, 50.0, is_verbose=True)
    assert 10 <= len(printed(capsys)) <= 12


def test_work_that_is_not_counted_is_announced_soon(capsys: pytest.CaptureFixture[str]) -> None:
    said = threading.Event()

    def tell(text: str) -> None:
        say(text)
        said.set()

    with Lines(tell).task("Loading torch", 0, "") as task:
        task.advance(5)
        assert said.wait(60)
    assert printed(capsys) == ["Loading torch ..."]


def test_work_that_ends_at_once_is_not_announced(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines, "_SOON", 1e6)
    shown = Lines(say)
    with (
        shown.task("Reading M", 0, ""),
        contextlib.suppress(KeyError),
        shown.task("Parsing", 0, ""),
    ):
        raise KeyError
    assert printed(capsys) == []
    with shown.task("Reading M", 0, ""):
        shown.note("a note")
    assert printed(capsys) == ["Reading M ...", "a note"], "before the next line"
