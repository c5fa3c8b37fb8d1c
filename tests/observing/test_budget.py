"""How memory is divided, for given amounts of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.errors import UsageError
from reap2gguf.models.table import describe
from reap2gguf.observing import budget as budget_module
from reap2gguf.observing.budget import (
    CONTEXT_BYTES,
    LIBRARY_BYTES,
    MOST_TOKENS,
    THREAD_BYTES,
    Budget,
    Kind,
    Memory,
    Need,
    copies_experts,
    importance_bytes,
    size_text,
)
from tests.families.gpt_oss import TINY as GPT_OSS
from tests.tiny import EXAMPLE

GIB = 2**30
# Qwen3.5-35B-A3B, 250 rows of 4,096 tokens, bfloat16, without flash-linear-attention
LARGE = Need(
    layer=int(1.65 * GIB),
    position=262144 + 32768,
    hidden=4096,
    n_positions=1024000,
    longest_row=4096,
)


def fit(need: Need, device: str, limit: int | None, spool: str, host: int = 100) -> Budget:
    """On an idle 80 GiB GPU; with `host` GiB free in RAM, of which the process has half a GiB."""
    free = {"cuda": 79 * GIB, "cpu": host * GIB - GIB // 2}[device]
    taken = {"cuda": CONTEXT_BYTES, "cpu": GIB // 2}[device]
    allowed = None if limit is None else limit - taken
    memory = Memory(free, host * GIB, limit, allowed)
    return budget_module.fit(need, device, memory, spool)


def takes(need: Need, budget: Budget) -> int:
    """Bytes of the device that a budget leads to."""
    weights = need.layer * (2 if budget.prefetch else 1)
    moving = 0 if budget.spool == "device" else 4 * need.hidden
    held = need.n_positions * need.hidden if budget.spool == "device" else 0
    return weights + held + budget.batch_tokens * (need.position + moving)


def test_a_large_gpu_holds_everything() -> None:
    assert fit(LARGE, "cuda", None, "auto") == Budget(32768, "device", True)


@pytest.mark.parametrize("limit", [6, 8, 12, 16, 24])
def test_a_limit_is_kept_and_weights_are_prefetched(limit: int) -> None:
    budget = fit(LARGE, "cuda", limit * GIB, "auto")
    assert budget.prefetch
    assert budget.batch_tokens >= 4096
    assert takes(LARGE, budget) < limit * GIB - 640 * 2**20


def test_a_small_gpu_keeps_hidden_states_on_the_host() -> None:
    assert fit(LARGE, "cuda", 8 * GIB, "auto") == Budget(8192, "host", True)


def test_from_a_disk_a_batch_goes_through_as_many_layers_as_the_limit_holds() -> None:
    need = replace(LARGE, position=2**17, n_layers=40)
    depths = {}
    for limit in (6, 8, 12, 16, 24, None):
        size = None if limit is None else limit * GIB
        budget = fit(need, "cuda", size, "disk")
        depths[limit] = budget.depth
        assert budget.prefetch
        weights = need.layer * (budget.depth - 1)  # one, and one that is read, are in `takes`
        assert takes(need, budget) + weights < (limit or 79) * GIB - 640 * 2**20
    # 8 and 12 GiB: batches half as large, for one layer more
    assert depths == {6: 1, 8: 2, 12: 4, 16: 6, 24: budget_module.MOST_LAYERS, None: 8}
    assert fit(replace(need, n_layers=4), "cuda", None, "disk").depth == 3
    for spool in ("device", "host"):
        assert fit(need, "cuda", 24 * GIB, spool).depth == 1, "they are as fast as a GPU"
    assert fit(need, "cpu", None, "disk").depth == 1


def test_a_small_host_keeps_them_on_disk() -> None:
    assert fit(LARGE, "cuda", 8 * GIB, "auto", host=3).spool == "disk"


def test_an_embedding_beside_an_mtp_block_is_counted() -> None:
    large = replace(LARGE, embedding=int(2.5 * GIB), has_mtp=True)
    assert fit(LARGE, "cuda", 10 * GIB, "auto").batch_tokens == 16384
    assert fit(large, "cuda", 10 * GIB, "auto").batch_tokens == 8192
    with pytest.raises(UsageError):
        fit(large, "cuda", 4 * GIB, "auto")


def test_prefetching_is_given_up_last() -> None:
    budget = fit(LARGE, "cuda", 4 * GIB, "auto")
    assert budget == Budget(4096, "host", False)
    assert takes(LARGE, budget) < 4 * GIB - 640 * 2**20


@pytest.mark.parametrize("spool", ["device", "host", "disk"])
def test_a_spool_that_is_asked_for_is_taken(spool: str) -> None:
    assert fit(LARGE, "cuda", None, spool).spool == spool


def test_on_a_cpu_host_and_device_are_one() -> None:
    need = Need(layer=GIB, position=2**18, hidden=8192, n_positions=65536, longest_row=2048)
    assert fit(need, "cpu", None, "host").spool == "device"
    assert fit(need, "cpu", 3 * GIB, "auto") == Budget(2048, "device", False)


def test_a_little_less_memory_changes_nothing() -> None:
    """Sums depend in their last bits on the batches, and these on what happens to be free."""
    budgets = {
        fit(LARGE, "cuda", int(12 * GIB - step * 2**20), "auto") for step in range(0, 400, 20)
    }
    assert len(budgets) == 1


def test_a_row_longer_than_a_batch_is_a_batch() -> None:
    need = Need(layer=GIB, position=2**18, hidden=8192, n_positions=2**17, longest_row=40000)
    assert fit(need, "cuda", None, "auto").batch_tokens == 40000 > MOST_TOKENS["cuda"]


@pytest.mark.parametrize("spool", ["auto", "device"])
def test_a_limit_that_is_too_small_is_an_error_that_names_one_that_is_enough(spool: str) -> None:
    with pytest.raises(UsageError) as error:
        fit(LARGE, "cuda", 3 * GIB, spool)
    text = str(error.value)
    assert text.startswith("--memory 3.0 GiB is too small; this model needs at least ")
    assert "for a layer of 1.6 GiB and a row of 4,096 tokens" in text
    enough = float(text.split("at least ")[1].split(" GiB")[0])
    assert fit(LARGE, "cuda", int(enough * GIB), spool).batch_tokens == 4096
    with pytest.raises(UsageError):
        fit(LARGE, "cuda", int((enough - 0.2) * GIB), spool)


def test_processes_that_share_a_limit_need_more_of_it() -> None:
    memory = Memory(free=79 * GIB, host=GIB, limit=4 * GIB, allowed=GIB, n_sharing=2)
    with pytest.raises(UsageError, match=r"--memory 4.0 GiB is too small") as error:
        budget_module.fit(LARGE, "cpu", memory, "auto")
    enough = float(str(error.value).split("at least ")[1].split(" GiB")[0])
    memory = replace(memory, allowed=int((enough - 2) / 2 * GIB))
    assert budget_module.fit(LARGE, "cpu", memory, "auto").batch_tokens == 4096


@pytest.mark.parametrize("limit", [None, GIB])
def test_a_limit_is_not_blamed_if_the_machine_is_too_small(limit: int | None) -> None:
    with pytest.raises(UsageError, match=r"^not enough memory: 512 MiB free, .* at least .* GiB"):
        fit(LARGE, "cpu", limit, "auto", host=1)


def test_sizes_in_messages() -> None:
    texts = [size_text(n_bytes) for n_bytes in (8, 5000, 2**20, 700 * 2**20, 3 * GIB)]
    assert texts == ["8 bytes", "5,000 bytes", "1 MiB", "700 MiB", "3.0 GiB"]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_work_beside_a_sweep_gets_what_changes_no_batch(device: str) -> None:
    need = Need(layer=GIB, position=2**18, hidden=8192, n_positions=65536, longest_row=2048)
    memory = Memory(24 * GIB, 24 * GIB)
    budget = budget_module.fit(need, device, memory, "auto")

    def has_room(n_bytes: int, memory: Memory = memory) -> bool:
        return budget_module.fits_beside(n_bytes, budget, need, device, memory, "auto")

    assert has_room(2**28)
    assert not has_room(24 * GIB)
    least = next(n for n in range(25) if not has_room(n * GIB))
    assert all(not has_room(n * GIB) for n in range(least, 25))


def test_work_beside_a_sweep_on_a_cpu_counts_in_its_limit() -> None:
    need = Need(layer=GIB, position=2**18, hidden=8192, n_positions=65536, longest_row=2048)
    memory = Memory(100 * GIB, 100 * GIB, 6 * GIB, 5 * GIB)
    budget = budget_module.fit(need, "cpu", memory, "auto")
    held = takes(need, budget)
    for n_bytes in range(0, 5 * GIB, 2**27):
        if budget_module.fits_beside(n_bytes, budget, need, "cpu", memory, "auto"):
            assert held + n_bytes <= 5 * GIB
    assert not budget_module.fits_beside(5 * GIB, budget, need, "cpu", memory, "auto")


def test_threads_and_sums_of_a_cpu_count() -> None:
    """Each thread has buffers, and an expert in the computing type; an imatrix grows."""
    with Checkpoint.open(EXAMPLE) as checkpoint:
        model = describe(checkpoint)
        copied = {size: copies_experts(model, checkpoint.tensors, size, False) for size in (2, 4)}
        assert not copies_experts(model, checkpoint.tensors, 4, True)
    assert copied == {2: False, 4: True}  # it is stored in bfloat16
    facts = model.facts
    expert = 3 * facts.hidden_size * facts.expert_width * 4
    sums = importance_bytes(model)
    per_layer = facts.n_experts * (facts.hidden_size + facts.expert_width) * 4
    assert sums > per_layer * len(facts.moe_layers)
    for n_threads in (1, 64):
        kind = Kind(model, 4, False, False, n_threads, sums, True)
        others = kind.need({0: 1000}, 10, 512, 512).others
        assert others == LIBRARY_BYTES + n_threads * (THREAD_BYTES + expert) + sums
        assert replace(kind, on_gpu=True).need({0: 1000}, 10, 512, 512).others == 0


def test_the_others_are_taken_from_the_batches() -> None:
    need = Need(layer=GIB, position=2**18, hidden=8192, n_positions=65536, longest_row=2048)
    memory = Memory(100 * GIB, 100 * GIB, 6 * GIB, 5 * GIB)
    budget = budget_module.fit(need, "cpu", memory, "auto")
    less = budget_module.fit(replace(need, others=GIB), "cpu", memory, "auto")
    assert (less.batch_tokens, less.prefetch) < (budget.batch_tokens, budget.prefetch)
    held = budget_module.held_bytes(replace(need, others=GIB), budget)
    assert held == budget_module.held_bytes(need, budget) + GIB


def test_attention_without_a_kernel_takes_memory_with_the_length_of_rows(tmp_path: Path) -> None:
    with Checkpoint.open(GPT_OSS.write(tmp_path / "model")) as checkpoint:
        model = describe(checkpoint)
    kind = Kind(model, 4, False, False)
    short, long = (kind.need({0: 1000}, 10, 4096, row).position for row in (256, 1024))
    per_copy = model.facts.n_heads * (1024 - 256) * 4
    assert 3 * per_copy < long - short < 6 * per_copy
    with Checkpoint.open(EXAMPLE) as checkpoint:
        other = Kind(describe(checkpoint), 4, False, False)
    short, long = (other.need({0: 1000}, 10, 4096, row).position for row in (256, 1024))
    assert short == long
