"""Share, speed and time left of a task."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from reap2gguf.terminal import meter
from reap2gguf.terminal.meter import Meter


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(meter, "time", clock)
    return clock


def test_facts_say_where_how_fast_and_how_long(clock: Clock) -> None:
    task = Meter("Observing experts", 100_000, "tokens")
    assert task.facts == ""
    task.at("layer 12/48")
    task.advance(1000)
    assert task.facts == "layer 12/48", "one sample is no speed"
    clock.now += 5
    task.advance(10_000)
    assert task.facts == "layer 12/48, 2.0 k tokens/s", "one step does not tell the time left"
    clock.now += 5
    task.advance(10_000)
    assert task.facts == "layer 12/48, 2.0 k tokens/s, 40 s left"
    assert task.share == 0.21
    clock.now += 2
    assert task.summary == "Observing experts: 100.0 k tokens in 12 s"


def test_what_was_done_before_is_no_speed(clock: Clock) -> None:
    task = Meter("Observing experts", 1000, "tokens")
    task.advance(900)
    for _ in range(2):
        clock.now += 5
        task.advance(5)
    assert task.facts == "1 tokens/s, 90 s left".replace("90 s", "2 min")


def test_a_slow_start_does_not_count(clock: Clock) -> None:
    """The first batch compiles kernels for a minute, the others take a fourth of a second each."""
    task = Meter("Observing experts", 100_000, "tokens")
    task.advance(0)
    shown = []
    for seconds in (60.0, 5.0, 0.25, 0.25, 0.25, 0.25):
        clock.now += seconds
        task.advance(100)
        shown.append(task.facts)
    assert shown == [
        "2 tokens/s",
        "20 tokens/s",
        "400 tokens/s",
        *["400 tokens/s, 4 min left"] * 3,
    ]
    assert not any("h left" in facts for facts in shown)


def test_a_pause_later_counts(clock: Clock) -> None:
    task = Meter("Writing", 10_000, "bytes")
    task.advance(0)
    for seconds in (1, 1, 1, 6, 1):
        clock.now += seconds
        task.advance(100)
    assert task.speed == 50
    assert task.facts.endswith("190 s left".replace("190 s", "3 min"))


def test_the_speed_is_that_of_the_last_minute(clock: Clock) -> None:
    task = Meter("Writing", 10_000, "bytes")
    for _ in range(60):
        clock.now += 10
        task.advance(10)
    for _ in range(7):
        clock.now += 10
        task.advance(100)
    assert task.speed == 10


def test_more_than_the_total_is_no_more_than_all(clock: Clock) -> None:
    task = Meter("Fetching", 10, "bytes")
    task.advance(5)
    for _ in range(2):
        clock.now += 1
        task.advance(5)
    assert task.share == 1.0
    assert task.facts.endswith("0 s left")


def test_threads_lose_nothing() -> None:
    task = Meter("Reading", 4000, "rows")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: task.advance(), range(4000)))
    assert task.done == 4000


def test_names_of_files_stay_on_their_line() -> None:
    task = Meter("Fetching a\x1b[2Jb", 1, "bytes")
    task.at("c\nd")
    assert (task.title, task.facts) == ("Fetching a\\x1b[2Jb", "c\\nd")
