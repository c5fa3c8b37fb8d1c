"""Ctrl-C in a real terminal, while the main thread is in a call that cannot be interrupted."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest

from tests.terminal.screen import Screen

MOST_SECONDS = 120  # only against hanging

_PROGRAM = """
import hashlib, sys, time
import reap2gguf
from reap2gguf import cli

def work(*arguments, **named):
    while True:
        try:
            print("at work", flush=True)
            while not {busy}:
                time.sleep(0.01)
            hashlib.pbkdf2_hmac("sha256", b"x", b"x", 2**31 - 1)  # holds off signal handlers
        except KeyboardInterrupt:
            if not {busy}:
                raise

reap2gguf.{function} = work
sys.argv = ["reap2gguf", *{words}]
cli.main()
"""


class Session:
    """A program in a terminal."""

    def __init__(self, code: str) -> None:
        self._read, write = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.DEVNULL,
            stdout=write,
            stderr=write,
            env=os.environ | {"TERM": "xterm"},
        )
        os.close(write)
        self.printed = ""
        self._guard = threading.Timer(MOST_SECONDS, self.process.kill)
        self._guard.start()

    def wait_for(self, text: str) -> None:
        """Read until a text was printed. Raises AssertionError if the program ends without it."""
        while text not in self.printed:
            piece = self._piece()
            assert piece, f"ended without {text!r}: {self.printed}"

    def end(self) -> int:
        """Read the rest, and wait for the exit code."""
        while self._piece():
            pass
        return self.process.wait()

    def close(self) -> None:
        self._guard.cancel()
        self.process.kill()
        self.process.wait()
        os.close(self._read)

    def _piece(self) -> str:
        with suppress(OSError):  # the program has closed the terminal
            piece = os.read(self._read, 4096).decode(errors="replace")
            self.printed += piece
            return piece
        return ""


@contextmanager
def running(function: str, *words: str, busy: bool) -> Iterator[Session]:
    session = Session(_PROGRAM.format(function=function, words=list(words), busy=busy))
    try:
        session.wait_for("at work")
        yield session
    finally:
        session.close()


def test_ctrl_c_ends_and_says_how_to_resume() -> None:
    with running("observe", "observe", "x", "-o", "y", busy=False) as session:
        session.process.send_signal(signal.SIGINT)
        assert session.end() == 130
    # where it ends before that is printed, there is no acknowledgement, and never one after it
    assert session.printed.endswith("Interrupted. Resume with: reap2gguf observe x -o y\r\n")
    assert "Traceback" not in session.printed


def test_it_is_acknowledged_during_a_long_call_and_the_second_ends_it() -> None:
    with running("observe", "observe", "x", "-o", "y", busy=True) as session:
        session.process.send_signal(signal.SIGINT)
        session.wait_for("press Ctrl-C again to stop at once")
        assert session.process.poll() is None
        session.process.send_signal(signal.SIGINT)
        assert session.end() == 130
    assert "Interrupted. Resume with: reap2gguf observe x -o y" in session.printed


@pytest.mark.parametrize("busy", [False, True])
def test_terminate_is_acknowledged_too(busy: bool) -> None:
    with running("verify", "verify", "x", busy=busy) as session:
        session.process.send_signal(signal.SIGTERM)
        if busy:
            session.wait_for("press Ctrl-C again to stop at once")
            session.process.send_signal(signal.SIGTERM)  # does nothing more
            session.process.send_signal(signal.SIGINT)
        assert session.end() == 130
    assert "Interrupted.\r\n" in session.printed


_SPINNER = """
import hashlib, os, signal, sys
import reap2gguf
from reap2gguf import cli
from reap2gguf.terminal.console import terminal_progress

def work(*arguments, **named):
    with terminal_progress().task("Loading torch", 0, ""):
        print("at work", flush=True)
        while True:
            try:
                hashlib.pbkdf2_hmac("sha256", b"x", b"x", 2**31 - 1)
            except KeyboardInterrupt:
                pass

reap2gguf.observe = work
sys.argv = ["reap2gguf", "observe", "x", "-o", "y"]
cli.main()
"""


def test_a_spinner_stays_apart_and_a_second_ctrl_c_shows_the_cursor() -> None:
    session = Session(_SPINNER)
    try:
        session.wait_for("at work")
        session.wait_for("Loading torch")
        session.process.send_signal(signal.SIGINT)
        session.wait_for("press Ctrl-C again to stop at once.")
        session.process.send_signal(signal.SIGINT)
        assert session.end() == 130
    finally:
        session.close()
    screen = Screen()
    screen.feed(session.printed.encode())
    assert any(line.startswith("Interrupted: stopping;") for line in screen.lines)
    last = "Interrupted. Resume with: reap2gguf observe x -o y"
    assert screen.lines[-1] == last, "and no spinner is left"
    assert session.printed.rindex("\x1b[?25h") > session.printed.rindex("\x1b[?25l")


def test_a_signal_while_the_display_starts_leaves_nothing() -> None:
    code = """
import os, signal, sys
import reap2gguf
from reap2gguf import cli
from reap2gguf.terminal.console import terminal_progress
from rich.console import Console

def work(*arguments, **named):
    show_cursor = Console.show_cursor
    def slow(console, show=True):  # the signal comes while the cursor is hidden
        show_cursor(console, show)
        if not show:
            os.kill(os.getpid(), signal.SIGINT)
    Console.show_cursor = slow
    with terminal_progress().task("Loading torch", 0, ""):
        raise AssertionError("not interrupted")

reap2gguf.observe = work
sys.argv = ["reap2gguf", "observe", "x", "-o", "y"]
cli.main()
"""
    session = Session(code)
    try:
        assert session.end() == 130
    finally:
        session.close()
    screen = Screen()
    screen.feed(session.printed.encode())
    assert screen.lines[-1] == "Interrupted. Resume with: reap2gguf observe x -o y"
    assert not any("Loading" in line or "not interrupted" in line for line in screen.lines)
    assert session.printed.rindex("\x1b[?25h") > session.printed.rindex("\x1b[?25l")
