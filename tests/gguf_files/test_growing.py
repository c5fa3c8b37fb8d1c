"""Entries that are waited for."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import pytest

from reap2gguf.gguf_files.growing import GrowingEntries, entry_shape
from reap2gguf.gguf_files.imatrix import ImatrixEntry
from reap2gguf.stoppable import Stopped


def entry(name: str, rows: int = 2) -> ImatrixEntry:
    return ImatrixEntry(name, np.ones((rows, 3), np.float32), np.ones(rows, np.int64))


def started(function: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=function)
    thread.start()
    return thread


def test_what_is_known_before_the_first_entry() -> None:
    entries = GrowingEntries({"a": (2, 3), "b": (1, 3)})
    assert list(entries) == ["a", "b"]
    assert len(entries) == 2
    assert "a" in entries
    assert "c" not in entries
    assert not entries.is_final("a")
    assert entries.get("c") is None
    assert entry_shape(entries, "a") == (2, 3)
    assert entry_shape({"a": entry("a")}, "a") == (2, 3)


def test_a_reader_waits_for_its_entry_only() -> None:
    entries = GrowingEntries({"a": (2, 3), "b": (1, 3)})
    found: list[ImatrixEntry] = []
    thread = started(lambda: found.append(entries["b"]))
    entries.publish(entry("a"))
    assert entries["a"].name == "a"
    assert found == []
    entries.publish(entry("b", 1))
    thread.join(60)
    assert [one.name for one in found] == ["b"]
    assert entries.is_final("b")


def test_readers_are_stopped_where_no_entry_will_come() -> None:
    entries = GrowingEntries({"a": (2, 3), "b": (1, 3)})
    stopped: list[str] = []

    def read() -> None:
        try:
            entries["b"]
        except Stopped:
            stopped.append("b")

    thread = started(read)
    with pytest.raises(KeyboardInterrupt), entries.filled():  # noqa: PT012
        entries.publish(entry("a"))
        raise KeyboardInterrupt
    thread.join(60)
    assert stopped == ["b"]
    assert entries["a"].name == "a", "what is final stays"
    with pytest.raises(Stopped):
        entries["b"]


def test_only_what_was_announced_is_published() -> None:
    entries = GrowingEntries({"a": (2, 3)})
    for wrong in (entry("b"), entry("a", rows=1)):
        with pytest.raises(ValueError, match="was not announced"):
            entries.publish(wrong)


def test_idle_is_when_every_reader_waits() -> None:
    entries = GrowingEntries({"a": (2, 3)})
    entries.n_readers = 2
    one = started(lambda: entries.get("a") and None)
    entries.publish(entry("a"))
    one.join(60)
    assert entries.seconds_idle == 0, "the other reader had work"
