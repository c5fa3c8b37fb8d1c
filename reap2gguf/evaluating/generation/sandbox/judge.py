"""The process that judges a program of a model, which runs in another process.

It gets the tests on its standard input, calls the candidate's function over two pipes, compares
what it returns here, and writes its verdict on its standard output, which the candidate does not
have. So a program that prints, exits, or changes anything in its own process cannot pass. The tests
are a data set's code; this process is in a jail as well. Standard library alone.
"""

from __future__ import annotations

import builtins
import json
import os
import select
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from reap2gguf.evaluating.generation.sandbox import jail, values
from reap2gguf.evaluating.generation.sandbox.comparing import Differing

PASSED, TIMED_OUT = "passed", "timed out"
_PATIENCE = 4.0  # times the limit of processor time, of any time, for a machine that is busy
_PATIENT = 2.0  # seconds, added to it
_POLL = 0.05
_PIECE = 2**16


class StoppedError(BaseException):
    """The candidate cannot continue, and why. No `except Exception` of a test catches it."""


class Candidate:
    """The function in the other process, called as if it were here.

    `seconds` of processor time are the candidate's; where the system has no clock of other
    processes, they are of any time.
    """

    def __init__(self, requests: int, answers: int, process: int, seconds: float) -> None:
        self._requests, self._answers = requests, answers
        self._clock = (~process << 3) | 2  # clock_getcpuclockid(3)
        self._has_clock = True
        self._latest = 0.0  # what the clock showed
        self._processor_time()
        self._left = seconds
        self._received = bytearray()
        self.problem = ""  # why it cannot continue; empty while it can
        for descriptor in (requests, answers):
            os.set_blocking(descriptor, False)

    def wait_until_loaded(self) -> None:
        """Raises StoppedError if the program does not define the function."""
        self._answer(b"", self._left)

    def __call__(self, *positional: Any, **named: Any) -> Any:
        return self.call(positional, named, self._left)

    def call(self, positional: Any, named: Any, seconds: float) -> Any:
        """What the function returns within `seconds`; what it raises is raised here."""
        if self.problem:
            raise StoppedError(self.problem)
        request = values.frame(values.encode((positional, named)))
        return self._answer(request, min(seconds, self._left))

    def _answer(self, request: bytes, seconds: float) -> Any:
        begun, started = time.monotonic(), self._processor_time()
        try:
            message = self._exchange(request, begun, started, seconds)
            used = self._processor_time() - started
            self._left -= used
            if used > seconds:
                raise StoppedError(TIMED_OUT)
            return self._value(message)
        except StoppedError as error:
            self.problem = str(error)
            raise
        except (values.BrokenFrameError, RecursionError) as error:
            self.problem = f"failed: it returned what is no value ({error})"
            raise StoppedError(self.problem) from error

    def _value(self, message: Any) -> Any:
        if not isinstance(message, list) or len(message) != 2:
            raise values.BrokenFrameError("no answer")
        kind, content = message
        if kind == "error":
            name, text = str(content[0]), str(content[1])
            known = getattr(builtins, name, None)
            if isinstance(known, type) and issubclass(known, AssertionError | LookupError):
                raise known(text)
            raise _raised(known, name, text)
        return values.decode(content)

    def _exchange(self, request: bytes, begun: float, started: float, seconds: float) -> Any:
        """Write a request and read the next frame."""
        rest = memoryview(request)
        while True:
            if (message := self._taken()) is not None:
                return message[0]
            writes = [self._requests] if rest else []
            ready, writable, _ = select.select([self._answers], writes, [], _POLL)
            if writable:
                try:
                    rest = rest[os.write(self._requests, rest[:_PIECE]) :]
                except BrokenPipeError:
                    rest = rest[:0]  # it has ended; its last words may be there
            if ready:
                if not (piece := os.read(self._answers, _PIECE)):
                    raise StoppedError("ended")
                self._received += piece
            elif time.monotonic() - begun > seconds:
                waited = time.monotonic() - begun
                used = self._processor_time() - started
                if used > seconds or waited > _PATIENCE * seconds + _PATIENT:
                    raise StoppedError(TIMED_OUT)

    def _taken(self) -> tuple[Any] | None:
        """The next whole frame of what was received; None if it is not there yet."""
        size = values.LENGTH.size
        if len(self._received) < size:
            return None
        length = values.LENGTH.unpack(self._received[:size])[0]
        if length > values.MAX_FRAME:
            raise values.BrokenFrameError(f"{length:,} bytes")
        if len(self._received) < size + length:
            return None
        body = bytes(self._received[size : size + length])
        del self._received[: size + length]
        return (values.parsed(body),)

    def _processor_time(self) -> float:
        """Seconds of processor time so far; of any time where the system has no such clock."""
        if self._has_clock:
            try:
                self._latest = time.clock_gettime(self._clock)
            except OSError:
                self._has_clock = self._latest > 0.0  # else it has just ended
            if self._has_clock:
                return self._latest
        return time.monotonic()


def _raised(known: Any, name: str, text: str) -> Exception:
    if isinstance(known, type) and issubclass(known, Exception):
        try:
            return known(text)
        except TypeError:  # such as UnicodeDecodeError, which takes more
            pass
    return RuntimeError(f"{name}: {text}")


def judge_by_tests(job: Mapping[str, Any], candidate: Candidate) -> None:
    """HumanEval: the function `check` of the tests calls the candidate's function.

    Other functions of the prompt are the prompt's own. Raises what the tests raise.
    """
    space: dict[str, Any] = {}
    exec(job["prompt"] + "\n" + job["test"], space)
    space[job["entry_point"]] = candidate
    space["check"](candidate)


def judge_by_reference(job: Mapping[str, Any], candidate: Candidate) -> None:
    """EvalPlus: the candidate's function and a right one get the same arguments."""
    space: dict[str, Any] = {}
    exec(job["reference"], space)
    differing = Differing(job["oracle"], job["tolerance"])
    for arguments in map(values.decode, job["inputs"]):
        # the right function may change its arguments
        begun = time.process_time()
        expected = space[job["entry_point"]](*values.decode(values.encode(arguments)))
        took = time.process_time() - begun
        seconds = max(job["least_seconds"], job["factor"] * took)
        found = candidate.call(arguments, {}, seconds)
        if not differing.is_right(arguments, found, expected):
            raise AssertionError


_WAYS: Mapping[str, Callable[[Mapping[str, Any], Candidate], None]] = {
    "tests": judge_by_tests,
    "reference": judge_by_reference,
}


def verdict(job: Mapping[str, Any], candidate: Candidate) -> str:
    """PASSED, TIMED_OUT, or why the candidate failed."""
    try:
        candidate.wait_until_loaded()
        _WAYS[job["way"]](job, candidate)
    except StoppedError as error:
        return str(error)
    except BaseException as error:  # noqa: BLE001 - whatever a test or the candidate raises
        text = str(error)[:200]
        return candidate.problem or f"failed: {type(error).__name__}{': ' if text else ''}{text}"
    return candidate.problem or PASSED


def main() -> None:
    """Judge what standard input describes; the arguments are the pipes to and from the candidate
    and its process id."""
    requests, answers, process = map(int, sys.argv[1:])
    job = json.load(sys.stdin)
    guards = jail.enter(job)
    if not set(job["required"]) <= set(guards):
        os._exit(1)
    output = os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nothing, descriptor)
    candidate = Candidate(requests, answers, process, job["seconds"])
    os.write(output, json.dumps({"verdict": verdict(job, candidate)}).encode())
    os._exit(0)
