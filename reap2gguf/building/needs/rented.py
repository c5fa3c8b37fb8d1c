"""Usual rented machines with one GPU, and how long a calibration pass takes on each.

An H100 was measured (bench/RESULTS.md). Other GPUs are scaled by their data sheets: about 70 % of
a pass is matrix products in bfloat16, the rest moves memory. Processors of rented machines are
those beside that H100; the disk is what providers offer as usual.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from reap2gguf.building.needs.machine import Gpu, Machine
from reap2gguf.building.needs.seconds import Host
from reap2gguf.building.needs.speed import Speed
from reap2gguf.errors import UsageError

GIB = 2**30
H100 = "H100"
_PRODUCTS = 0.7  # share of a pass, on an H100
_CONTEXT = 0.02  # of a GPU's memory, in use before anything runs
_HUB_BYTES = 2.5e8  # per second, from the Hub to a data centre
_ENOUGH_DISK = 2**50  # a disk is rented as large as it has to be


@dataclass(frozen=True)
class Offer:
    """A rented machine: its GPU's figures, and what comes with it."""

    words: tuple[str, ...]  # that a driver's name of this GPU holds
    memory: int  # bytes of the GPU
    tflops: float  # bfloat16, dense
    bandwidth: float  # GB per second
    cores: int
    host: int  # bytes of RAM


GPUS: Mapping[str, Offer] = {
    "L4": Offer(("L4",), 22 * GIB, 121, 300, 8, 32 * GIB),
    "L40S": Offer(("L40S",), 44 * GIB, 362, 864, 16, 64 * GIB),
    "A100-80GB": Offer(("A100", "80GB"), 79 * GIB, 312, 2039, 12, 120 * GIB),
    H100: Offer((H100,), 79 * GIB, 989, 3350, 16, 125 * GIB),
    "H200": Offer(("H200",), 139 * GIB, 989, 4800, 16, 200 * GIB),
}
# Other GPUs that people have: bfloat16 TFLOPS and GB per second.
_OTHERS: Mapping[str, tuple[float, float]] = {
    "A100": (312, 1555),
    "A10": (125, 600),
    "A40": (150, 696),
    "A6000": (155, 768),
    "B200": (2250, 8000),
    "GH200": (989, 4000),
    "RTX 6000 Ada": (182, 960),
    "RTX 5090": (210, 1792),
    "RTX 4090": (165, 1008),
    "RTX 4080": (97, 717),
    "RTX 3090": (71, 936),
    "T4": (20, 320),
    "V100": (30, 900),
}
_UNKNOWN = (70.0, 700.0)

# Beside an H100: 16 processors of a shared machine, measured in three whole builds.
_SPEED = Speed(
    flops=6e10,
    python=1.5,
    quantize={"plain": 1.3, "k": 1.3, "iq4": 1.3, "ggml": 1.3},
    hash_bytes=1e9,
    read_bytes=1.5e9,
    write_bytes=1.25e9,
)


def gpu_factor(name: str) -> float:
    """Time of a calibration pass on a GPU, an H100's being 1, by the driver's name of it."""
    words = name.replace("-", " ")
    for offer in GPUS.values():
        if all(word in words.split() for word in offer.words):
            return _factor(offer.tflops, offer.bandwidth)
    found = [figures for known, figures in _OTHERS.items() if f" {known} " in f" {words} "]
    return _factor(*(found[0] if found else _UNKNOWN))


def _factor(tflops: float, bandwidth: float) -> float:
    best = GPUS[H100]
    moved = (1 - _PRODUCTS) * best.bandwidth / bandwidth
    return _PRODUCTS * best.tflops / tflops + moved


def as_gpu(name: str) -> Gpu:
    """A GPU of the table, empty."""
    n_bytes = GPUS[name].memory
    return Gpu(name, n_bytes, int(n_bytes * (1 - _CONTEXT)))


def rented_machine(name: str) -> tuple[Machine, Host]:
    """A machine of the table. Raises UsageError for another name."""
    if name not in GPUS:
        raise UsageError(f"no figures for a GPU {name!r}; there are some of {', '.join(GPUS)}")
    offer = GPUS[name]
    machine = Machine(
        device="cuda",
        gpu=as_gpu(name),
        memory_bytes=offer.host,
        memory_free_bytes=int(offer.host * 0.95),
        disk_free_bytes=_ENOUGH_DISK,
        cache_free_bytes=_ENOUGH_DISK,
        is_one_disk=True,
        cores=offer.cores,
    )
    factor = _factor(offer.tflops, offer.bandwidth)
    return machine, Host(_SPEED, offer.cores, factor, offer.host * 3 // 4, _HUB_BYTES)


def rented_cpu(cores: int) -> tuple[Machine, Speed]:
    """A machine without a GPU, of the same kind as those in the table, as large as it has to be."""
    machine = Machine(
        device="cpu",
        gpu=None,
        memory_bytes=_ENOUGH_DISK,
        memory_free_bytes=_ENOUGH_DISK,
        disk_free_bytes=_ENOUGH_DISK,
        cache_free_bytes=_ENOUGH_DISK,
        is_one_disk=True,
        cores=cores,
    )
    return machine, _SPEED
