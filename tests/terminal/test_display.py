"""Interrupts wait for a display that starts or ends; the end of the process erases it."""

from __future__ import annotations

import threading
import time

import pytest

from reap2gguf.terminal import display as display_module
from reap2gguf.terminal.display import Display


class Fake:
    """Something live that is closed at once, or never."""

    def __init__(self, hangs: bool = False) -> None:
        self.is_closed = False
        self._hangs = hangs

    def note(self, text: str) -> None:
        raise AssertionError(text)

    def close(self) -> None:
        while self._hangs:
            time.sleep(0.01)
        self.is_closed = True

    def release(self) -> None:
        self._hangs = False


def test_an_interrupt_waits_for_the_end_of_a_change() -> None:
    display, done = Display(), []
    with pytest.raises(KeyboardInterrupt):
        display.interrupt()

    def change() -> None:
        with display.changing():
            with display.changing():
                display.interrupt()
            done.append("whole")

    with pytest.raises(KeyboardInterrupt):
        change()
    assert done == ["whole"]
    with display.changing():
        pass  # it is raised once


def test_a_change_of_another_thread_holds_nothing() -> None:
    display, inside, leave = Display(), threading.Event(), threading.Event()

    def change() -> None:
        with display.changing():
            inside.set()
            leave.wait()

    other = threading.Thread(target=change)
    other.start()
    inside.wait()
    try:
        with pytest.raises(KeyboardInterrupt):
            display.interrupt()
    finally:
        leave.set()
        other.join()


def test_the_end_closes_what_is_live_once() -> None:
    display, live = Display(), Fake()
    display.end()
    display.live = live
    display.end()
    assert live.is_closed
    assert display.live is None


def test_the_end_does_not_wait_for_a_terminal_that_hangs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(display_module, "_PATIENCE_SECONDS", 0.01)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    display, live = Display(), Fake(hangs=True)
    display.live = live
    display.end()
    live.release()
    assert capsys.readouterr().err == "\x1b[?25h\n"
