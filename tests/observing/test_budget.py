"""How memory is divided, with the machine's own amounts replaced by given ones."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from reap2gguf.errors import UsageError
from reap2gguf.observing import budget as budget_module
from reap2gguf.observing.budget import Budget, Need, room_on
from reap2gguf.observing.sizes import MOST_TOKENS

GIB = 2**30
GPU, CPU = torch.device("cuda"), torch.device("cpu")
# Qwen3.5-35B-A3B, 250 rows of 4,096 tokens, bfloat16, without flash-linear-attention
LARGE = Need(
    layer=int(1.65 * GIB), position=262144 + 32768, hidden=4096, n_positions=1024000,
    longest_row=4096,
)  # fmt: skip


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """An idle 80 GiB GPU and 100 GiB of host memory, of which this process takes half a GiB."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (79 * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
    monkeypatch.setattr(budget_module, "resident_bytes", lambda: GIB // 2)


def fit(need: Need, device: torch.device, limit: int | None, spool: str, host: int = 100) -> Budget:
    """With `host` GiB free on the host."""
    room = room_on(device, host * GIB, limit)
    return budget_module.fit(need, device.type, room, host * GIB, spool)


def takes(need: Need, budget: Budget) -> int:
    """Bytes of the device that a budget leads to."""
    weights = need.layer * (2 if budget.ahead else 1)
    moving = 0 if budget.spool == "device" else 4 * need.hidden
    held = need.n_positions * need.hidden if budget.spool == "device" else 0
    return weights + held + budget.batch_tokens * (need.position + moving)


def test_a_large_gpu_holds_everything() -> None:
    assert fit(LARGE, GPU, None, "auto") == Budget(32768, "device", True)


@pytest.mark.parametrize("limit", [6, 8, 12, 16, 24])
def test_a_limit_is_kept_and_weights_are_read_ahead(limit: int) -> None:
    budget = fit(LARGE, GPU, limit * GIB, "auto")
    assert budget.ahead
    assert budget.batch_tokens >= 4096
    assert takes(LARGE, budget) < limit * GIB - 640 * 2**20


def test_a_small_gpu_keeps_hidden_states_on_the_host() -> None:
    assert fit(LARGE, GPU, 8 * GIB, "auto") == Budget(8192, "host", True)


def test_a_small_host_keeps_them_on_disk() -> None:
    assert fit(LARGE, GPU, 8 * GIB, "auto", host=3).spool == "disk"


def test_an_embedding_beside_an_mtp_block_is_counted() -> None:
    large = replace(LARGE, embedding=int(2.5 * GIB), has_mtp=True)
    assert fit(LARGE, GPU, 10 * GIB, "auto").batch_tokens == 16384
    assert fit(large, GPU, 10 * GIB, "auto").batch_tokens == 8192
    with pytest.raises(UsageError):
        fit(large, GPU, 4 * GIB, "auto")


def test_processes_share_the_limit_of_a_host() -> None:
    assert room_on(CPU, 50 * GIB, 8 * GIB, 2) == 4 * GIB - GIB // 2
    assert room_on(GPU, 50 * GIB, 8 * GIB, 2) == room_on(GPU, 50 * GIB, 8 * GIB, 1)


def test_reading_ahead_is_given_up_last() -> None:
    budget = fit(LARGE, GPU, 4 * GIB, "auto")
    assert budget == Budget(4096, "host", False)
    assert takes(LARGE, budget) < 4 * GIB - 640 * 2**20


@pytest.mark.parametrize("spool", ["device", "host", "disk"])
def test_a_spool_that_is_asked_for_is_taken(spool: str) -> None:
    assert fit(LARGE, GPU, None, spool).spool == spool


def test_on_a_cpu_host_and_device_are_one() -> None:
    need = Need(layer=GIB, position=2**18, hidden=8192, n_positions=65536, longest_row=2048)
    assert fit(need, CPU, None, "host").spool == "device"
    assert fit(need, CPU, 3 * GIB, "auto") == Budget(2048, "device", False)


def test_a_little_less_memory_changes_nothing() -> None:
    """Sums depend in their last bits on the batches, and these on what happens to be free."""
    budgets = {fit(LARGE, GPU, int(12 * GIB - step * 2**20), "auto") for step in range(0, 400, 20)}
    assert len(budgets) == 1


def test_a_row_longer_than_a_batch_is_a_batch() -> None:
    need = Need(layer=GIB, position=2**18, hidden=8192, n_positions=2**17, longest_row=40000)
    assert fit(need, GPU, None, "auto").batch_tokens == 40000 > MOST_TOKENS["cuda"]


@pytest.mark.parametrize("spool", ["auto", "device"])
def test_what_is_missing_is_said(spool: str) -> None:
    with pytest.raises(UsageError) as error:
        fit(LARGE, GPU, 3 * GIB, spool)
    text = str(error.value)
    assert "2.4 GiB of memory are left for a sweep" in text
    more = float(text.rsplit("raise --memory by ", 1)[1].split("GiB")[0])
    assert fit(LARGE, GPU, int((3 + more + 0.1) * GIB), spool).batch_tokens == 4096
