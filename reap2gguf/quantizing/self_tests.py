"""Remembers which types a kernel makes as libggml does: each is tried once per process.

Threads may ask at the same time; the first one tries, and the others wait for it. What a process
knows is forgotten in a child that it forks, where another thread's lock would never open.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Hashable
from threading import Lock


class SelfTests:
    """What was found of one set of kernels."""

    def __init__(self) -> None:
        self._found: dict[Hashable, bool] = {}
        self._lock = Lock()

    def passes(self, key: Hashable, attempt: Callable[[], bool]) -> bool:
        """What `attempt` finds; it is called once for each key. What it raises is not kept."""
        if (known := self._found.get(key)) is not None:
            return known
        with self._lock:
            if key not in self._found:
                self._found[key] = attempt()
            return self._found[key]


_of: dict[int, SelfTests] = {}  # by the identity of the kernels, while these exist
_lock = Lock()


def self_tests_of(kernels: object) -> SelfTests:
    """The self-tests of these kernels, in this process.

    Kernels that are loaded more than once may say by `tested_as` of which object the tests are.
    """
    kernels = getattr(kernels, "tested_as", kernels)
    key = id(kernels)
    with _lock:
        if key not in _of:
            _of[key] = SelfTests()
            # a later object may have the same identity
            weakref.finalize(kernels, _of.pop, key, None).atexit = False
        return _of[key]


def _forget() -> None:
    global _lock
    _lock = Lock()
    _of.clear()


os.register_at_fork(after_in_child=_forget)
