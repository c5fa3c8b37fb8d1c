"""Devices, dtypes, memory and the first lines of a sweep, with the machine's own replaced."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from reap2gguf.errors import UsageError
from reap2gguf.observing import linear_attention, sweep_plan
from reap2gguf.observing.budget import Budget, Memory
from reap2gguf.observing.compute.ranks import Ranks
from reap2gguf.observing.sweep_plan import (
    SweepContext,
    available_memory,
    opening_notes,
    resolve_device,
)
from reap2gguf.options import ComputeOptions

GIB = 2**30
GPU, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """An 80 GiB GPU, of which 1 GiB is in use and 2 GiB are reserved by torch; 100 GiB of RAM."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (77 * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 2 * GIB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(sweep_plan, "available_bytes", lambda: 100 * GIB)
    monkeypatch.setattr(sweep_plan, "resident_bytes", lambda: GIB // 2)


class Alike(Ranks):
    """Processes that all have the same."""

    def least(self, value: int) -> int:
        return value


@pytest.mark.parametrize(
    ("has_gpu", "options", "expected"),
    [
        (False, ComputeOptions(), ("cpu", torch.float32)),
        (False, ComputeOptions("cpu", "bfloat16"), ("cpu", torch.bfloat16)),
        (True, ComputeOptions(), ("cuda", torch.bfloat16)),
        (True, ComputeOptions("cuda", "float32"), ("cuda", torch.float32)),
        (True, ComputeOptions("cpu"), ("cpu", torch.float32)),
    ],
)
def test_device_and_dtype(
    has_gpu: bool,
    options: ComputeOptions,
    expected: tuple[str, torch.dtype],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    device, dtype = resolve_device(options)
    assert (device.type, dtype) == expected


def test_a_missing_gpu_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="no CUDA device"):
        resolve_device(ComputeOptions(device="cuda"))


def test_memory_without_a_limit() -> None:
    assert available_memory(GPU, Ranks(), None) == Memory(79 * GIB, 100 * GIB)
    free = 100 * GIB - GIB // 2
    assert available_memory(CPU, Ranks(), None) == Memory(free, 100 * GIB)


def test_a_limit_counts_what_the_process_has_already() -> None:
    on_cpu = available_memory(CPU, Ranks(), 8 * GIB)
    assert on_cpu.usable == on_cpu.allowed == 8 * GIB - GIB // 2
    on_gpu = available_memory(GPU, Ranks(), 8 * GIB)
    assert on_gpu.usable == on_gpu.allowed == 8 * GIB - 640 * 2**20
    assert available_memory(GPU, Ranks(), 200 * GIB).usable == 79 * GIB


def test_processes_share_the_limit_and_the_memory_of_a_host() -> None:
    two = Alike(0, 0, 2, on_machine=2)
    memory = available_memory(CPU, two, 8 * GIB)
    assert (memory.host, memory.usable) == (50 * GIB, 4 * GIB - GIB // 2)
    alone = available_memory(GPU, Ranks(), 8 * GIB)
    assert available_memory(GPU, two, 8 * GIB) == replace(alone, host=50 * GIB)
    elsewhere = Alike(0, 0, 2, on_machine=1)
    for device in (CPU, GPU):
        alone = available_memory(device, Ranks(), 8 * GIB)
        assert available_memory(device, elsewhere, 8 * GIB) == alone, "a machine for each"


def notes(device: torch.device, budget: Budget, gib: float, linear: bool = False) -> list[str]:
    """The first lines of a sweep on two processes."""
    decoder = SimpleNamespace(device=device, dtype=torch.bfloat16, has_linear_attention=linear)
    nobody = cast("Any", None)
    context = SweepContext(cast("Any", decoder), nobody, Ranks(0, 0, 2), nobody)
    return list(opening_notes(context, budget, int(gib * GIB)))


def test_first_lines() -> None:
    in_memory, on_disk = Budget(8192, "device", True), Budget(8192, "disk", False)
    assert notes(CPU, in_memory, 0.9) == [
        "computing on 2 x the CPU in bfloat16, batches of up to 8,192 tokens"
    ]
    assert notes(CPU, on_disk, 31)[0].endswith(
        "; keeping 31.0 GiB of activations on disk; not enough memory to prefetch weights"
    )
    for budget, where in ((in_memory, "GPU memory"), (Budget(8192, "host", True), "RAM")):
        (line,) = notes(GPU, budget, 2)
        assert line == (
            "computing on 2 x a GPU in bfloat16, batches of up to 8,192 tokens; keeping 2.0 GiB of "
            f"activations in {where}"
        )
    assert notes(CPU, in_memory, 2)[0].endswith("in RAM")


def test_the_code_of_linear_attention_is_named_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    budget = Budget(8192, "device", True)
    monkeypatch.setattr(linear_attention, "version", lambda package: "0.6")
    assert notes(GPU, budget, 0, linear=True)[1] == "linear attention: flash-linear-attention 0.6"
    monkeypatch.setattr(linear_attention, "installed_version", lambda: None)
    assert "half the speed" in notes(GPU, budget, 0, linear=True)[1]
    assert len(notes(CPU, budget, 0, linear=True)) == 1


def test_only_long_waits_for_weights_are_reported() -> None:
    assert sweep_plan.waiting_note("Observing experts", 4.9, 100.0) is None
    assert sweep_plan.waiting_note("Observing experts", 0.9, 1.0) is None
    note = sweep_plan.waiting_note("Observing experts", 5.1, 100.0)
    assert note == "Observing experts: 5.1 of 100.0 s spent waiting for weights"
