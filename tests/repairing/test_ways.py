"""Which way of holding the Gram matrix is taken: at a large model's size, on a GPU and without."""

from __future__ import annotations

from dataclasses import replace

import pytest

from reap2gguf.errors import UsageError
from reap2gguf.observing.budget import Memory, Need, cpu_memory, gpu_memory
from reap2gguf.repairing.gram_size import WAYS, GramSize, gram_size
from reap2gguf.repairing.ways import Way, best_way, repair_need

GIB = 2**30
# Qwen3-30B-A3B with 64 of its 128 experts, in bfloat16, and half a million tokens
PRUNED_LAYER, WHOLE_LAYER = 640 * 2**20, 1250 * 2**20
NEED = Need(PRUNED_LAYER, 150_000, 4096, 2**19, 2048, 48, 622 * 2**20)


def size_of(way: str) -> GramSize:
    return gram_size(way, 64, 768, 2048, 4, on_gpu=True)


def on_gpu(n_bytes: int, host: int = 64 * GIB) -> Way:
    need = repair_need(NEED, WHOLE_LAYER)
    return best_way(need, size_of, "cuda", gpu_memory(78 * GIB, 79 * GIB, host, n_bytes), "auto")


def test_a_large_gpu_holds_the_matrix() -> None:
    found = on_gpu(70 * GIB)
    assert (found.name, found.budget.spool) == ("device", "device")
    assert found.budget.depth == 1
    assert found.whole_need.others == found.need.others + size_of("device").device


def test_a_smaller_one_leaves_it_in_ram_and_one_without_ram_never_forms_it() -> None:
    assert on_gpu(16 * GIB).name == "host"
    assert on_gpu(16 * GIB, host=12 * GIB).name == "never"


def test_a_gpu_that_is_too_small_for_any_way_is_refused() -> None:
    with pytest.raises(UsageError, match=r"--memory 4\.0 GiB is too small"):
        on_gpu(4 * GIB)


def test_ram_that_is_too_small_for_the_way_asked_for_is_said() -> None:
    need, memory = repair_need(NEED, WHOLE_LAYER), Memory(70 * GIB, 12 * GIB)
    with pytest.raises(UsageError, match=r"the Gram matrix of a layer takes .*, and 12\.0 GiB are"):
        best_way(need, size_of, "cuda", memory, "auto", ("host",))


def test_on_a_cpu_the_matrix_is_not_held_twice() -> None:
    sizes = {way: gram_size(way, 64, 768, 2048, 8, on_gpu=False) for way in WAYS}
    need = replace(repair_need(NEED, WHOLE_LAYER), others=0)
    for host, expected in ((128 * GIB, "device"), (24 * GIB, "never")):
        memory = cpu_memory(host, None, 0)
        assert best_way(need, sizes.__getitem__, "cpu", memory, "auto").name == expected


def test_both_sides_of_a_layer_and_its_rows_are_needed() -> None:
    need = repair_need(NEED, WHOLE_LAYER)
    assert (need.layer, need.others) == (WHOLE_LAYER, PRUNED_LAYER)
    assert need.hidden == 3 * NEED.hidden
