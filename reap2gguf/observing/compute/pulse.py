"""Signs of life: each process of a run tells the others that it lives, and why it ended.

A process that is killed closes its connections, and the others hear of it at once. A machine that
loses its power or its network closes nothing, and the others would wait for it. So every process
counts up a number in the store that torchrun provides, and ends once another one's number stands
still. Two threads do this: one talks to the store, which may not answer, and one watches.

Seconds are counted by the watching thread, not read from a clock: processes that were all suspended
together find each other alive when they continue.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

from reap2gguf.errors import PeerError

TICK_SECONDS = 1.0
PATIENCE_TICKS = 120  # a process that is swapped out, or on a slow network, may be silent as long
_MOST_LETTERS = 2000  # of another process's message


class Store(Protocol):
    """What is used of torch's `Store`; a call raises RuntimeError where the store is gone."""

    def set(self, key: str, value: str) -> None:
        """Keep a value."""

    def get(self, key: str) -> bytes:
        """A value that is there."""

    def multi_get(self, keys: list[str]) -> list[bytes]:
        """Several of them."""

    def check(self, keys: list[str]) -> bool:
        """Whether all of them are there."""


def _end(message: str) -> None:
    """End this process, whose main thread may wait in a library that nothing interrupts."""
    with suppress(OSError):  # a terminal that is gone
        sys.stderr.write(f"\nError: {message}\n")
        sys.stderr.flush()
    os._exit(PeerError.exit_code)


class Pulse:
    """The signs of life of this process and the others, from `start` to `stop`."""

    def __init__(
        self, store: Store, rank: int, machines: list[str], at_loss: Callable[[str], None] = _end
    ) -> None:
        """`machines`: the machine of each process; `at_loss` gets a message for the user."""
        self._store = store
        self._rank = rank
        self._machines = machines
        self._at_loss = at_loss
        self.needs_others = True  # whether it ends once one of them is lost
        self._others = [number for number in range(len(machines)) if number != rank]
        self._silent = dict.fromkeys(self._others, 0)  # ticks since the number last changed
        self._stopped = threading.Event()
        self._threads = [
            threading.Thread(target=target, daemon=True, name=name)
            for target, name in ((self._talk, "pulse"), (self._watch, "pulse-watch"))
        ]

    def start(self) -> None:
        """Begin to count and to watch."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End both threads; the one that talks may still wait for an answer."""
        self._stopped.set()
        for thread in self._threads:
            thread.join(2 * TICK_SECONDS)

    def tell(self, message: str) -> None:
        """Leave the others word why this process ends."""
        with suppress(RuntimeError):  # the store is gone, and so are the others
            self._store.set(f"word/{self._rank}", message[:_MOST_LETTERS])

    def why_lost(self) -> str:
        """What to say when a connection is lost: the other process's own words, if it left any."""
        for number in self._others:
            with suppress(RuntimeError):  # the store is gone, with what was left there
                if self._store.check([f"word/{number}"]):
                    word = self._store.get(f"word/{number}").decode("utf-8", "replace")
                    return f"{self.name_of(number)} ended: {word}"
        return "another process of this run ended; see its own message"

    def name_of(self, number: int) -> str:
        """A process, as a user knows it."""
        return f"process {number + 1} of {len(self._machines)}, on {self._machines[number]},"

    def _talk(self) -> None:
        keys = [f"pulse/{number}" for number in self._others]
        seen = [b""] * len(keys)
        count = 0
        with suppress(RuntimeError):  # the store is gone: from now on all numbers stand still
            while True:
                self._store.set(f"pulse/{self._rank}", str(count))
                count += 1
                if self._stopped.wait(TICK_SECONDS):
                    return
                if not self._store.check(keys):
                    continue  # one has not begun yet
                found = self._store.multi_get(keys)
                for number, before, now in zip(self._others, seen, found, strict=True):
                    if now != before:
                        self._silent[number] = 0
                seen = found

    def _watch(self) -> None:
        while not self._stopped.wait(TICK_SECONDS):
            for number in self._others:
                self._silent[number] += 1
            lost = [n for n, ticks in self._silent.items() if ticks > PATIENCE_TICKS]
            if lost and self.needs_others:
                self._at_loss(
                    f"{self.name_of(lost[0])} has given no sign of life for "
                    f"{PATIENCE_TICKS * TICK_SECONDS:.0f} seconds; check that machine and the "
                    "network, then run the same command again on all machines"
                )
                return
