"""Threads that wait for one another, and end when one of them fails."""

from __future__ import annotations

import threading

import pytest

from reap2gguf.progress import CallbackProgress, ProgressEvent
from reap2gguf.stoppable import Joint, StoppableProgress, Stopped


def test_a_thread_waits_until_other_work_is_done() -> None:
    joint = Joint()
    joint.begin(["one", "two"])
    seen: list[str] = []

    def wait() -> None:
        joint.wait(["one"])
        seen.append("one is done")

    thread = threading.Thread(target=wait)
    thread.start()
    joint.end("two")
    assert seen == []
    joint.end("one")
    thread.join(60)
    assert seen == ["one is done"]
    assert joint.running == frozenset()
    joint.wait(["one", "never begun"])


def test_a_stop_ends_those_who_wait_and_those_who_report() -> None:
    joint, events = Joint(), list[ProgressEvent]()
    progress = StoppableProgress(CallbackProgress(events.append), joint)
    joint.begin(["one"])
    caught: list[BaseException] = []

    def wait() -> None:
        try:
            joint.wait(["one"])
        except Stopped as error:
            caught.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    with pytest.raises(Stopped), progress.task("Work", 2, "units") as task:  # noqa: PT012
        task.at("here")
        task.advance()
        joint.stop()
        progress.note("notes are printed to the end")
        task.advance()
    thread.join(60)
    assert len(caught) == 1
    kinds = [event.kind for event in events]
    assert kinds == ["begin", "advance", "advance", "note", "end"]
    with pytest.raises(Stopped), progress.task("More", 1, "units"):
        pass
    assert len(events) == len(kinds), "a task that is not begun is not shown"
