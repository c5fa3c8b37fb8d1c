"""Machines that do not exist, for estimates that depend on no real one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from reap2gguf.building.needs.estimate import Estimate, Reused, estimate
from reap2gguf.building.needs.machine import Gpu, Machine
from reap2gguf.building.needs.reuse import find_reused
from reap2gguf.building.needs.speed import Speed
from reap2gguf.building.plan import Plan

GIB = 2**30
LAPTOP = Machine(
    device="cpu",
    gpu=None,
    memory_bytes=24 * GIB,
    memory_free_bytes=22 * GIB,
    disk_free_bytes=80 * GIB,
    cache_free_bytes=80 * GIB,
    is_one_disk=True,
    cores=2,
)
H100 = replace(LAPTOP, device="cuda", gpu=Gpu("NVIDIA H100 80GB HBM3", 79 * GIB, 78 * GIB))


def needs_on(plan: Plan, machine: Machine = LAPTOP, reused: Reused | None = None) -> Estimate:
    """What a plan needs on a machine of the reference speed."""
    return estimate(plan, find_reused(plan) if reused is None else reused, machine, Speed())


def laptop(**changes: Any) -> Machine:
    """The laptop with other figures."""
    return replace(LAPTOP, **changes)
