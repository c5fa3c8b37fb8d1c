"""A process of the tests that answers each line with a line; whatever it does, the tests end.

A child that hangs is killed together with all that it started, and the test that waited for it
fails. If instead the process of the tests dies, the child reads the end of its input and ends too;
what the child has forked is ended by `end_in_time`.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import suppress
from types import TracebackType
from typing import Any

# These only guard against hanging: no test takes as long, on a slow and busy machine either. A
# fork is ended before its parent is, and its parent before pytest (`faulthandler_timeout`) ends.
MOST_SECONDS = 300
MOST_FORK_SECONDS = 240


def end_in_time(seconds: float = MOST_FORK_SECONDS) -> None:
    """Let SIGALRM end the calling process, a fork, after `seconds`."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, seconds)


def lines_for_forks() -> Iterator[str]:
    """The lines of the input, for a process that forks a child for each.

    What it has loaded by then is left out of the children's collections of garbage, which would
    copy its pages.
    """
    gc.collect()
    gc.freeze()
    yield from sys.stdin


class Child:
    """`python -m MODULE`, with pipes to its input and output; use as a context or close it."""

    def __init__(self, module: str, *arguments: str, environment: Mapping[str, str]) -> None:
        self._name = module
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            start_new_session=True,  # so that its forks can be killed with it
        )

    def send(self, request: Any) -> None:
        """Write a request as one line of JSON."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()

    def receive(self) -> str:
        """The next line that the child prints.

        Raises AssertionError if it ends, or prints nothing within MOST_SECONDS.
        """
        assert self._process.stdout is not None
        guard = threading.Timer(MOST_SECONDS, self._kill)
        guard.start()
        try:
            line = self._process.stdout.readline()
        finally:
            guard.cancel()
        assert line, f"{self._name} ended without an answer, or was killed after {MOST_SECONDS} s"
        return line

    def close(self) -> None:
        """End the child."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):  # of a child that has died
            self._process.stdin.close()
        try:
            self._process.wait(MOST_SECONDS)
        except subprocess.TimeoutExpired:
            self._kill()
            self._process.wait()
            raise
        finally:
            self._process.stdout.close()

    def __enter__(self) -> Child:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
