"""Threads that wait for the network, for which neither Ctrl-C nor the end of the program waits."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from reap2gguf.atomic import remove
from reap2gguf.errors import OutputError

T = TypeVar("T")
_DESCRIPTORS = Path("/proc/self/fd")
_UNFINISHED = ".incomplete"  # how huggingface_hub ends the name of a file that is still coming


def side_by_side(actions: Sequence[Callable[[], T]], at_once: int) -> list[T]:
    """What actions return, in order. The first error ends it, and is raised.

    An executor would wait for its threads when Ctrl-C is pressed, and once more at the end of the
    program: for as long as the network takes.
    """
    results: list[Future[T]] = [Future() for _ in actions]
    left = iter(zip(actions, results, strict=True))
    turn, is_over = threading.Lock(), threading.Event()

    def take() -> tuple[Callable[[], T], Future[T]] | None:
        with turn:
            return None if is_over.is_set() else next(left, None)

    def work() -> None:
        while (found := take()) is not None:
            action, result = found
            try:
                result.set_result(action())
            except BaseException as error:  # noqa: BLE001 - whatever it is, who waits is told
                result.set_exception(error)

    for _ in range(min(at_once, len(actions))):
        threading.Thread(target=work, daemon=True).start()
    try:
        return [result.result() for result in results]
    finally:
        is_over.set()


def drop_unfinished(folder: Path) -> None:
    """Remove what huggingface_hub is still writing in a folder of its cache, in this process.

    Each of its downloads has a name of its own and none goes on with another's, so what is left
    behind when the program ends would lie there for ever. Files of other processes stay. Where the
    system does not say which files are open (macOS), nothing is removed.
    """
    for descriptor in _DESCRIPTORS.iterdir() if _DESCRIPTORS.is_dir() else ():
        with suppress(OSError, OutputError):  # closed meanwhile, with its file gone
            path = Path(os.readlink(descriptor))
            if path.name.endswith(_UNFINISHED) and path.parent == folder.resolve():
                remove(path)
