"""Which tensors of an export wait for their importance, and what they were quantized with."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType as Type

from reap2gguf.exporting.awaited import AwaitedImportance
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
