"""Threads that share one list of work."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from reap2gguf.disk.threads import share_out


@pytest.mark.parametrize("n_threads", [1, 8])
def test_every_item_is_worked_on_once(n_threads: int) -> None:
    seen: list[int] = []
    share_out(seen.append, iter(range(1000)), n_threads)
    assert sorted(seen) == list(range(1000))


def test_after_an_error_no_thread_takes_another() -> None:
    taken: list[int] = []
    stopped: list[bool] = []
    waiting = threading.Event()

    @contextmanager
    def stopping() -> Iterator[None]:
        waiting.set()  # as what ends a download
        yield
        stopped.append(True)

    def work(item: int) -> None:
        taken.append(item)
        if item == 0:
            raise ValueError("no")
        assert waiting.wait(60)

    with pytest.raises(ValueError, match="no"):
        share_out(work, iter(range(100)), 2, stopping)
    assert len(taken) <= 2
    assert stopped == [True]


def test_an_error_of_the_list_is_raised() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise OSError("the list ended early")

    seen: list[int] = []
    with pytest.raises(OSError, match="the list ended early"):
        share_out(seen.append, items(), 4)
    assert seen == [1]
