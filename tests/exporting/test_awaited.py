"""Which tensors of an export wait for their importance, and what they were quantized with."""

from __future__ import annotations

import threading
import time
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType as Type

from reap2gguf.exporting.awaited import AwaitedImportance
from reap2gguf.exporting.row_ranges import work_through
from reap2gguf.gguf_files.growing import GrowingEntries
from reap2gguf.gguf_files.imatrix import ImatrixEntry

TYPES = {
    "norm": {Type.F32},
    "plain": {Type.Q8_0},
    "mixed": {Type.Q8_0, Type.Q4_K},
    "embd": {Type.Q4_K},
}
ENTRY = ImatrixEntry("mixed", np.ones((1, 4), np.float32), np.array([7]))


def tensors(*names: str) -> Any:
    return [SimpleNamespace(name=name) for name in names]


def growing() -> GrowingEntries:
    return GrowingEntries({"plain": (1, 4), "mixed": (1, 4)})


def test_what_needs_no_importance_is_written_first() -> None:
    entries = growing()
    importance = AwaitedImportance(entries, TYPES)
    assert [name for name in TYPES if not importance.is_final(name)] == ["mixed"]
    order = importance.in_order(tensors("mixed", "norm", "plain", "embd"))
    assert [one.name for one in order] == ["norm", "plain", "embd", "mixed"]
    for name in ("norm", "plain", "embd"):
        importance.wait(name)
        assert importance.digest(name) == ""
    entries.publish(ENTRY)
    importance.wait("mixed")
    order = importance.in_order(tensors("mixed", "norm"))
    assert [one.name for one in order] == ["mixed", "norm"], "the order of the file"


def test_a_failed_writer_stops_those_that_wait() -> None:
    """A full disk is reported at once, and not when the layer has been computed."""
    entries = growing()
    importance = AwaitedImportance(entries, TYPES)
    importance.expect_readers(1)
    found: list[BaseException] = []
    batches: list[Any] = [[], []]

    def work(batch: Any) -> None:
        if batch is batches[1]:
            importance.wait("mixed")
        while not entries._n_waiting:
            time.sleep(0.001)
        raise OSError(28, "No space left on device")

    def export() -> None:
        weights: Any = SimpleNamespace(without_fetching=nullcontext)
        try:
            work_through(work, weights, iter(batches), 2, importance.stop)
        except OSError as error:
            found.append(error)

    thread = threading.Thread(target=export, daemon=True)
    thread.start()
    thread.join(60)
    assert [str(error) for error in found] == ["[Errno 28] No space left on device"]


def test_a_whole_matrix_waits_for_nothing() -> None:
    importance = AwaitedImportance({"mixed": ENTRY}, TYPES)
    assert all(importance.is_final(name) for name in TYPES)


def test_the_digest_is_of_all_that_changes_the_bytes() -> None:
    def digest(entry: ImatrixEntry) -> str:
        return AwaitedImportance({"mixed": entry}, TYPES).digest("mixed")

    assert len(digest(ENTRY)) == 64
    assert digest(ENTRY) == digest(replace(ENTRY, counts=np.array([7], np.int64)))
    assert digest(ENTRY) != digest(replace(ENTRY, counts=np.array([8])))
    assert digest(ENTRY) != digest(replace(ENTRY, sums=np.nextafter(ENTRY.sums, np.float32(2))))
