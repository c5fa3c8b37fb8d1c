"""Signs of life, with a store that lies in this process."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, cast

import pytest

from reap2gguf.observing.compute import pulse
from reap2gguf.observing.compute.pulse import Pulse

LONG = 60.0  # seconds; only guards against hanging


class FakeStore:
    """What a pulse uses of a store."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}
        self.is_gone = False

    def set(self, key: str, value: str) -> None:
        self._answer()
        self.values[key] = value

    def check(self, keys: list[str]) -> bool:
        self._answer()
        return all(key in self.values for key in keys)

    def get(self, key: str) -> bytes:
        self._answer()
        return self.values[key].encode()

    def multi_get(self, keys: list[str]) -> list[bytes]:
        return [self.get(key) for key in keys]

    def _answer(self) -> None:
        if self.is_gone:
            raise RuntimeError("Connection reset by peer")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulse, "TICK_SECONDS", 0.005)
    monkeypatch.setattr(pulse, "PATIENCE_TICKS", 20)


def pulse_of(store: FakeStore, rank: int, at_loss: Callable[[str], None]) -> Pulse:
    return Pulse(cast("Any", store), rank, ["here", "there"], at_loss)


def test_one_that_falls_silent_is_lost() -> None:
    store, losses, is_lost = FakeStore(), [], threading.Event()

    def at_loss(message: str) -> None:
        losses.append(message)
        is_lost.set()

    first, second = pulse_of(store, 0, at_loss), pulse_of(store, 1, losses.append)
    first.start()
    second.start()
    before = int(store.values["pulse/1"])
    while int(store.values["pulse/1"]) < before + 40:  # twice the patience
        time.sleep(0.005)
    assert not losses
    second.stop()
    assert is_lost.wait(LONG)
    first.stop()
    (message,) = losses
    assert message.startswith("process 2 of 2, on there, has given no sign of life for 0 seconds;")


def test_a_store_that_is_gone() -> None:
    store, is_lost = FakeStore(), threading.Event()
    store.is_gone = True
    watching = pulse_of(store, 0, lambda message: is_lost.set())
    watching.start()
    assert is_lost.wait(LONG)
    watching.tell("nobody reads this")
    assert watching.why_lost() == "another process of this run ended; see its own message"
    watching.stop()


def test_the_first_process_alone_after_the_passes() -> None:
    losses: list[str] = []
    watching = pulse_of(FakeStore(), 0, losses.append)
    watching.needs_others = False
    watching.start()
    threading.Event().wait(0.3)  # several times the patience
    watching.stop()
    assert not losses


def test_the_last_words_of_a_process() -> None:
    store = FakeStore()
    pulse_of(store, 1, print).tell("ckpt: no such folder")
    said = pulse_of(store, 0, print).why_lost()
    assert said == "process 2 of 2, on there, ended: ckpt: no such folder"
