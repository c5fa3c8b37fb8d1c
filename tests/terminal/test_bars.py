"""What progress looks like on a terminal: one line per task, nothing left behind."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from reap2gguf.terminal import bars as bars_module
from reap2gguf.terminal.bars import Bars, bar_line
from reap2gguf.terminal.meter import Meter
from tests.terminal.screen import Screen


@pytest.fixture(autouse=True)
def every_task_is_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bars_module, "_SHORT_SECONDS", 0.0)


class Terminal:
    """Bars on a screen of 80x24 that the test can look at."""

    def __init__(self, encoding: str = "utf-8") -> None:
        self._output = io.BytesIO()
        text = io.TextIOWrapper(self._output, encoding=encoding, write_through=True)
        self.console = Console(file=text, force_terminal=True, width=80, height=24)
        self.bars = Bars(self.console)

    @property
    def screen(self) -> Screen:
        screen = Screen()
        # the driver of a terminal adds the carriage returns
        screen.feed(self._output.getvalue().replace(b"\n", b"\r\n"))
        return screen

    @property
    def lines(self) -> list[str]:
        return self.screen.lines


def test_a_task_is_a_bar_and_then_a_line() -> None:
    terminal = Terminal()
    with terminal.bars.task("Observing experts", 100, "tokens") as task:
        task.at("layer 2/4")
        task.advance(50)
        assert terminal.bars._live is not None
        terminal.bars._live.refresh()
        (line,) = terminal.lines
    assert line.startswith("Observing experts ━")
    assert line.endswith("50%  layer 2/4")
    (left,) = terminal.lines
    assert left.startswith("Observing experts: 100 tokens in ")


def test_a_short_task_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bars_module, "_SHORT_SECONDS", 1e9)
    terminal = Terminal()
    with terminal.bars.task("Hashing", 1, "bytes") as task:
        task.advance()
    assert terminal.lines == []


def test_work_that_is_not_counted_is_announced_and_vanishes() -> None:
    terminal = Terminal()
    with terminal.bars.task("Loading torch", 0, ""):
        (line,) = terminal.lines
        assert line.endswith(" Loading torch ...")
    assert terminal.lines == []


def test_a_bar_hides_what_is_not_counted() -> None:
    terminal = Terminal()
    with (
        terminal.bars.task("Stage 2/6: observe", 0, ""),
        terminal.bars.task("Observing", 4, "tokens"),
    ):
        assert terminal.bars._live is not None
        terminal.bars._live.refresh()
        (line,) = terminal.lines
        assert line.startswith("Observing ")
    (left,) = terminal.lines
    assert left.startswith("Observing: 4 tokens in ")


def test_tasks_at_the_same_time_leave_no_ghost() -> None:
    terminal = Terminal()
    bars = terminal.bars
    with bars.task("Fetching", 8, "bytes") as fetching:
        fetching.advance(3)
        with bars.task("Observing", 4, "tokens") as observing:
            observing.advance(4)
            bars.note("a line between")
            fetching.advance(2)
        bars.note("and another")
    titles = [line.partition(":")[0] for line in terminal.lines]
    assert titles == ["a line between", "Observing", "and another", "Fetching"]
    assert not any("━" in line for line in terminal.lines)


def test_a_task_that_fails_leaves_nothing() -> None:
    terminal = Terminal()
    with pytest.raises(ValueError, match="broken"), terminal.bars.task("Reading", 1, "rows"):
        raise ValueError("broken")
    assert terminal.lines == []


def test_long_notes_break_between_words_and_commands_stay_whole() -> None:
    terminal = Terminal()
    terminal.bars.note("imatrix: " + "a few words " * 12)
    assert all(len(line) <= 80 for line in terminal.lines)
    assert all(line.startswith("  a") or n == 0 for n, line in enumerate(terminal.lines))
    assert terminal.screen.n_wrapped == 0
    command = "Resume with: reap2gguf build " + "--calibration text.txt " * 6
    terminal.bars.note(command)
    assert command.strip() in "".join(line.ljust(80) for line in terminal.lines)


@pytest.mark.parametrize("width", [10, 20, 40, 79, 119])
@pytest.mark.parametrize("title", ["Hashing", "Verifying " + "long-name-" * 9 + "Q4_K_M.gguf", ""])
@pytest.mark.parametrize("is_ascii", [False, True])
def test_a_bar_never_leaves_its_line(width: int, title: str, is_ascii: bool) -> None:
    task = Meter(title, 3, "tokens")
    task.at("layer 12/48")
    for _ in range(4):
        line = bar_line(task, width, is_ascii).plain
        assert len(line) <= width
        assert "\n" not in line
        assert line.isascii() or not is_ascii
        task.advance()


def test_a_long_title_loses_its_middle() -> None:
    line = bar_line(Meter("Verifying " + "x" * 90 + "Q8_0.gguf", 2, "bytes"), 79).plain
    assert line.startswith("Verifying xxx")
    assert "…" in line
    assert "Q8_0.gguf ━━━" in line


def test_a_terminal_without_unicode_gets_ascii() -> None:
    terminal = Terminal("ascii")
    with terminal.bars.task("Reading", 0, ""):
        pass
    with terminal.bars.task("Reading", 2, "rows") as task:
        task.advance()
    assert terminal.lines
