"""Threads that share one list of work."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

Item = TypeVar("Item")


def share_out(
    work: Callable[[Item], None],
    items: Iterator[Item],
    n_threads: int,
    stopping: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> None:
    """Call `work` for every item: a thread takes the next as soon as it is free.

    After an error or an interrupt no thread takes another item; inside `stopping`, those that work
    are waited for. Then the error is raised.
    """
    lock, failed = threading.Lock(), threading.Event()

    def work_on() -> None:
        while True:
            with lock:
                if failed.is_set():
                    return
                try:
                    item = next(items)
                except StopIteration:
                    return
            work(item)

    with ThreadPoolExecutor(n_threads) as pool:
        try:
            for worker in as_completed([pool.submit(work_on) for _ in range(n_threads)]):
                worker.result()
        except BaseException:
            failed.set()
            with stopping():
                pool.shutdown()
            raise
