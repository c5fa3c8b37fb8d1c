"""How far a task is: its share, its speed and the time left, in numbers and in words."""

from __future__ import annotations

import threading
import time
from collections import deque

from reap2gguf.messages import duration, one_line, quantity

_WINDOW_SECONDS = 60.0  # the speed is that of the last minute
_SAMPLE_SECONDS = 0.1
# The first steps may compile kernels or fill caches. They are left out where they took this many
# times as long, per unit, as those after them.
_SLOW_START = 3.0
_FEWEST_STEPS = 2  # from which the time left is told


class Meter:
    """A running task, as `reap2gguf.progress.Task` describes it; threads may share it.

    What the first call of `advance` adds does not count as speed: a task that is resumed begins
    with all that was done before.
    """

    def __init__(self, title: str, total: float, unit: str) -> None:
        self.title = one_line(title)
        self.total = total
        self.unit = unit
        self.begun = time.monotonic()
        self.done = 0.0
        self.place = ""
        self._samples: deque[tuple[float, float]] = deque()  # (seconds, done), the oldest first
        self._lock = threading.Lock()

    def advance(self, amount: float = 1) -> None:
        now = time.monotonic()
        with self._lock:
            self.done += amount
            if self._samples and now - self._samples[-1][0] < _SAMPLE_SECONDS:
                return
            self._samples.append((now, self.done))
            while len(self._samples) > 2 and now - self._samples[0][0] > _WINDOW_SECONDS:
                self._samples.popleft()

    def at(self, place: str) -> None:
        self.place = one_line(place)

    @property
    def is_counted(self) -> bool:
        """Whether the amount of work is known."""
        return self.total > 0

    @property
    def seconds(self) -> float:
        """Since the task began."""
        return time.monotonic() - self.begun

    @property
    def share(self) -> float:
        """What is done, from 0 to 1."""
        return min(self.done / self.total, 1.0) if self.total else 0.0

    @property
    def speed(self) -> float | None:
        """Units per second; None until two calls of `advance` lie far enough apart.

        A slow start does not count where what follows is known.
        """
        return self._rate()[0]

    def _rate(self) -> tuple[float | None, int]:
        """Units per second, and the number of steps from which it is known."""
        with self._lock:
            samples = list(self._samples)
        if len(samples) < 2:
            return None, 0
        first, last = 0, samples[-1]
        while len(samples) - first > 2 and _is_slow(samples[first], samples[first + 1], last):
            first += 1
        begin, before = samples[first]
        return (last[1] - before) / (last[0] - begin), len(samples) - 1 - first

    @property
    def facts(self) -> str:
        """Place, speed and time left, such as "layer 3/48, 1.2 k tokens/s, 5 min left"."""
        words = [self.place] if self.place else []
        speed, n_steps = self._rate()
        if speed:
            if speed >= 1:
                words.append(f"{quantity(speed, self.unit)}/s")
            if n_steps >= _FEWEST_STEPS:
                words.append(f"{duration(max(self.total - self.done, 0) / speed)} left")
        return ", ".join(words)

    @property
    def summary(self) -> str:
        """The whole task in one line, once it is done."""
        return f"{self.title}: {quantity(self.total, self.unit)} in {exact_duration(self.seconds)}"


def _is_slow(
    begin: tuple[float, float], end: tuple[float, float], last: tuple[float, float]
) -> bool:
    """Whether a unit of the step from `begin` to `end` took far longer than one of those after."""
    pace = (end[0] - begin[0]) * (last[1] - end[1])
    return pace > _SLOW_START * (last[0] - end[0]) * (end[1] - begin[1])


def exact_duration(seconds: float) -> str:
    """A time that has passed: tenths of a second where they matter.

    >>> exact_duration(0.25), exact_duration(25)
    ('0.2 s', '25 s')
    """
    return f"{seconds:.1f} s" if seconds < 10 else duration(seconds)
