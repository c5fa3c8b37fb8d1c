"""Machines of Hugging Face Jobs: what each has and costs, and which one a build needs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from reap2gguf.errors import JobError
from reap2gguf.messages import shown, size

if TYPE_CHECKING:
    from reap2gguf.jobs.needs import Needs

TABLE_DATE = "2026-11-26"  # when the table below was read from the Hub's pages on Jobs
_GB = 10**9
_UNITS = {"GB": 10**9, "TB": 10**12, "GIB": 2**30, "TIB": 2**40}
_AMOUNT = re.compile(r"(\d{1,6}(?:\.\d+)?) *([GT]i?B)", re.IGNORECASE)
_MINUTES = {"minute": 1, "hour": 60, "second": 1 / 60}
_NO_BFLOAT16 = ("T4",)  # GPUs on which a calibration pass has no fast kernels


@dataclass(frozen=True)
class Flavor:
    """One kind of machine. A build uses one of its GPUs."""

    name: str
    gpu: str | None  # such as A100
    n_gpus: int
    gpu_bytes: int  # of each
    memory_bytes: int
    disk_bytes: int
    usd_per_hour: float

    def lacks(self, needs: Needs) -> str:
        """What a build needs and this machine does not have; empty if it fits."""
        if needs.needs_gpu and (self.gpu is None or self.gpu in _NO_BFLOAT16):
            return "a GPU with bfloat16"
        for what, has, wanted in (
            ("GPU memory", self.gpu_bytes, needs.gpu_memory_bytes),
            ("memory", self.memory_bytes, needs.memory_bytes),
            ("disk", self.disk_bytes, needs.disk_bytes),
        ):
            if has < wanted:
                return f"{size(wanted)} of {what} (it has {size(has)})"
        return ""

    def usd(self, needs: Needs) -> float:
        """The estimated price of the whole job."""
        return self.usd_per_hour * needs.seconds_on(self.gpu) / 3600


def _flavor(
    name: str, gpu: str | None, n_gpus: int, gpu_gb: int, memory_gb: int, disk_gb: int, usd: float
) -> Flavor:
    return Flavor(name, gpu, n_gpus, gpu_gb * _GB, memory_gb * _GB, disk_gb * _GB, usd)


# for --dry-run, and where the Hub does not answer; machines with several GPUs cost more and are
# no faster for one process
TABLE = (
    _flavor("cpu-basic", None, 0, 0, 16, 50, 0.01),
    _flavor("cpu-upgrade", None, 0, 0, 32, 50, 0.03),
    _flavor("cpu-xl", None, 0, 0, 124, 1000, 1.00),
    _flavor("cpu-performance", None, 0, 0, 256, 1024, 1.90),
    _flavor("t4-small", "T4", 1, 16, 15, 50, 0.40),
    _flavor("t4-medium", "T4", 1, 16, 30, 100, 0.60),
    _flavor("l4x1", "L4", 1, 24, 30, 400, 0.80),
    _flavor("a10g-small", "A10G", 1, 24, 15, 110, 1.00),
    _flavor("a10g-large", "A10G", 1, 24, 46, 200, 1.50),
    _flavor("l40sx1", "L40S", 1, 48, 62, 380, 1.80),
    _flavor("a100-large", "A100", 1, 80, 142, 1000, 2.50),
    _flavor("rtx-pro-6000", "RTX PRO 6000", 1, 96, 256, 475, 2.75),
    _flavor("h200", "H200", 1, 141, 256, 3000, 5.00),
    _flavor("h200x2", "H200", 2, 141, 512, 6000, 10.00),
    _flavor("h200x4", "H200", 4, 141, 1024, 12000, 20.00),
    _flavor("h200x8", "H200", 8, 141, 2048, 24000, 40.00),
)


def choose(flavors: Sequence[Flavor], needs: Needs) -> Flavor:
    """The machine on which the job costs least, of those that have what it needs.

    Raises JobError if there is none.
    """
    fitting = [flavor for flavor in flavors if not flavor.lacks(needs)]
    if fitting:
        return min(fitting, key=lambda flavor: (flavor.usd(needs), flavor.usd_per_hour))
    gpu = f"a GPU with {size(needs.gpu_memory_bytes)}, " if needs.needs_gpu else ""
    raise JobError(
        f"no machine of Hugging Face Jobs has {gpu}{size(needs.memory_bytes)} of memory and "
        f"{size(needs.disk_bytes)} of disk; pass fewer recipes, fewer --samples or --memory, or "
        "name a machine with --flavor"
    )


def find(flavors: Sequence[Flavor], name: str) -> Flavor:
    """The machine of that name. Raises JobError if there is none."""
    for flavor in flavors:
        if flavor.name == name:
            return flavor
    names = ", ".join(flavor.name for flavor in flavors)
    raise JobError(f"--flavor {shown(name)}: no such machine, expected one of {names}")


def from_api(hardware: Iterable[Any]) -> list[Flavor]:
    """Machines as the Hub lists them (JobHardwareInfo); those that cannot be read are left out."""
    found = (_from_api(one) for one in hardware)
    return [flavor for flavor in found if flavor is not None]


def _from_api(one: Any) -> Flavor | None:
    memory, disk = _bytes(one.ram), _bytes(one.ephemeral_storage)
    minutes = _MINUTES.get(str(one.unit_label))
    price = one.unit_cost_usd
    if memory is None or minutes is None or not isinstance(price, int | float) or price < 0:
        return None
    gpu, n_gpus, gpu_bytes = None, 0, 0
    if one.accelerator is not None:
        total = _bytes(one.accelerator.vram)
        count = str(one.accelerator.quantity)
        if total is None or not re.fullmatch(r"[1-9]\d?", count):
            return None
        if str(one.accelerator.type).lower() != "gpu":
            return None
        gpu, n_gpus = str(one.accelerator.model), int(count)
        gpu_bytes = total // n_gpus
    usd = price / minutes * 60
    return Flavor(str(one.name), gpu, n_gpus, gpu_bytes, memory, disk or 0, usd)


def _bytes(text: object) -> int | None:
    """Bytes of "142 GB"; None for anything else."""
    match = _AMOUNT.fullmatch(str(text).strip())
    return int(float(match[1]) * _UNITS[match[2].upper()]) if match else None
