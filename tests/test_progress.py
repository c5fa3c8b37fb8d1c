"""Events of a build for a program that calls it."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from reap2gguf.progress import CallbackProgress, ProgressEvent, working, working_if_long


def test_tasks_and_notes_become_events() -> None:
    events: list[ProgressEvent] = []
    progress = CallbackProgress(events.append)
    with progress.task("Reading", 3, "rows") as task:
        task.advance()
        progress.note("a fallback")
        task.advance(2)
    assert events == [
        ProgressEvent("begin", "Reading", 0.0, 3, "rows"),
        ProgressEvent("advance", "Reading", 1.0, 3, "rows"),
        ProgressEvent("note", text="a fallback"),
        ProgressEvent("advance", "Reading", 3.0, 3, "rows"),
        ProgressEvent("end", "Reading", 3.0, 3, "rows"),
    ]


def test_a_task_that_fails_ends_with_what_was_done() -> None:
    events: list[ProgressEvent] = []
    with suppress(ValueError), CallbackProgress(events.append).task("Reading", 3, "rows") as task:
        task.advance()
        raise ValueError("broken")
    assert events[-1] == ProgressEvent("end", "Reading", 1.0, 3, "rows")


def test_threads_advance_one_at_a_time_and_never_back() -> None:
    is_inside, overlaps = [False], []
    done: list[float] = []

    def listen(event: ProgressEvent) -> None:
        overlaps.append(is_inside[0])
        is_inside[0] = True
        done.append(event.done)
        is_inside[0] = False

    with (
        CallbackProgress(listen).task("Reading", 4000, "rows") as task,
        ThreadPoolExecutor(8) as pool,
    ):
        list(pool.map(lambda _: task.advance(), range(4000)))
    assert done == [*map(float, range(4001)), 4000.0]
    assert not any(overlaps)


def test_a_callback_may_report_itself() -> None:
    events: list[ProgressEvent] = []

    def listen(event: ProgressEvent) -> None:
        events.append(event)
        if event.kind == "begin":
            progress.note("seen")

    progress = CallbackProgress(listen)
    with progress.task("Reading", 1, "rows"):
        pass
    assert [event.kind for event in events] == ["begin", "note", "end"]


def test_a_place_is_told_and_kept() -> None:
    events: list[ProgressEvent] = []
    with CallbackProgress(events.append).task("Observing", 2, "tokens") as task:
        task.at("layer 1/4")
        task.advance()
    assert [(event.kind, event.done, event.text) for event in events] == [
        ("begin", 0.0, ""),
        ("advance", 0.0, "layer 1/4"),
        ("advance", 1.0, "layer 1/4"),
        ("end", 1.0, "layer 1/4"),
    ]


def test_work_that_is_not_counted_has_no_total() -> None:
    events: list[ProgressEvent] = []
    with working(CallbackProgress(events.append), "Loading torch"):
        assert events == [ProgressEvent("begin", "Loading torch", 0.0, 0, "")]
    assert [event.kind for event in events] == ["begin", "end"]


def test_work_that_takes_long_is_announced() -> None:
    events: list[ProgressEvent] = []
    is_announced = threading.Event()

    def listen(event: ProgressEvent) -> None:
        events.append(event)
        is_announced.set()

    with working_if_long(CallbackProgress(listen), "Compiling", seconds=0):
        assert is_announced.wait(60)
    assert [(event.kind, event.title) for event in events] == [
        ("begin", "Compiling"),
        ("end", "Compiling"),
    ]


def test_work_that_is_short_is_not_announced() -> None:
    events: list[ProgressEvent] = []
    with working_if_long(CallbackProgress(events.append), "Compiling", seconds=600):
        pass
    with suppress(ValueError), working_if_long(CallbackProgress(events.append), "C", seconds=600):
        raise ValueError
    assert events == []
