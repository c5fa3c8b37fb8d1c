"""What this machine has: GPU, processors, memory and disks. Nothing here loads torch."""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from reap2gguf.machine import available_bytes, total_bytes

if TYPE_CHECKING:
    from reap2gguf.options import ComputeOptions

_NVML = ("libnvidia-ml.so.1", "/usr/lib/wsl/lib/libnvidia-ml.so.1")
_NAME_BYTES = 96
_MOST_GPUS = 1024


@dataclass(frozen=True)
class Gpu:
    """A GPU and its memory in bytes."""

    name: str
    n_bytes: int
    free_bytes: int


@dataclass(frozen=True)
class Machine:
    """Where a build runs; sizes in bytes."""

    device: str  # cpu or cuda
    gpu: Gpu | None  # what `device` cuda means; None on a CPU
    memory_bytes: int
    memory_free_bytes: int
    disk_free_bytes: int  # where the output lies
    cache_free_bytes: int  # where the Hub's cache lies
    is_one_disk: bool  # whether output and cache lie on the same
    cores: int  # threads that the build uses


class _Memory(ctypes.Structure):
    """`nvmlMemory_t`."""

    _fields_ = tuple((name, ctypes.c_ulonglong) for name in ("total", "free", "used"))


def find_gpu() -> Gpu | None:
    """The first NVIDIA GPU that this process may use, as the driver describes it; None without.

    CUDA_VISIBLE_DEVICES is respected where it has numbers. None too where torch cannot use it.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible in ("", "-1") or not _torch_has_cuda():
        return None
    first = (visible or "0").split(",")[0].strip()
    number = int(first) if first.isdecimal() and len(first) < 5 else 0
    for name in _NVML if sys.platform == "linux" else ():
        try:
            return _ask(ctypes.CDLL(name), number)
        except (OSError, AttributeError):
            continue  # no driver, or one of long ago
    return None


def _torch_has_cuda() -> bool:
    """Whether the installed torch is not one for CPUs alone, by its version."""
    try:
        return not version("torch").endswith("+cpu")
    except PackageNotFoundError:
        return False  # no torch: the first pass says so


def _ask(nvml: ctypes.CDLL, number: int) -> Gpu | None:
    """A GPU's name and memory; None if the driver has no such GPU."""
    if nvml.nvmlInit_v2():
        return None
    try:
        handle, name, memory = (
            ctypes.c_void_p(),
            ctypes.create_string_buffer(_NAME_BYTES),
            _Memory(),
        )
        if nvml.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(number), ctypes.byref(handle)):
            return None
        failed = nvml.nvmlDeviceGetName(handle, name, ctypes.c_uint(_NAME_BYTES))
        if failed or nvml.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory)):
            return None
        said = name.value.decode("utf-8", "replace")
        return Gpu(said, int(memory.total), int(memory.free))
    finally:
        nvml.nvmlShutdown()


def this_machine(compute: ComputeOptions, output: Path, cache: Path) -> Machine:
    """What this machine has for a build into `output` of a model in `cache`.

    `gpu` is None where there is none, also for `--device cuda`.
    """
    gpu = find_gpu() if compute.device != "cpu" else None
    device = compute.likely_device if gpu is None else "cuda"
    output, cache = _existing(output), _existing(cache)
    return Machine(
        device=device,
        gpu=gpu,
        memory_bytes=total_bytes(),
        memory_free_bytes=available_bytes(),
        disk_free_bytes=_free(output),
        cache_free_bytes=_free(cache),
        is_one_disk=output.stat().st_dev == cache.stat().st_dev,
        cores=compute.threads,
    )


def _existing(folder: Path) -> Path:
    """A folder, or the nearest one above it that exists."""
    whole = Path(os.path.abspath(os.path.expanduser(folder)))
    return next((path for path in (whole, *whole.parents) if path.is_dir()), Path("/"))


def _free(folder: Path) -> int:
    """Free bytes on a folder's disk; none if the system does not say."""
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return 0  # a disk that does not answer takes no files: the plan says that there is no room
