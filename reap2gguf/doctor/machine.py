"""Check GPUs, processors, memory, disks and the Hub's settings."""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from reap2gguf.doctor.finding import Finding, State
from reap2gguf.machine import available_bytes, available_threads, container_limit, total_bytes
from reap2gguf.messages import size
from reap2gguf.observing.linear_attention import PACKAGE, REFERENCE_SPEED, installed_version
from reap2gguf.resources import install_command

_DRIVER = Path("/proc/driver/nvidia")  # exists if the kernel drives an NVIDIA GPU
_LITTLE_DISK = 2**30


def gpus() -> Iterator[Finding]:
    """Each GPU that torch finds, or why it finds none."""
    try:
        import torch
    except (ImportError, OSError, RuntimeError) as error:
        yield Finding("gpu", "unknown", State.PROBLEM, f"torch does not load ({error})")
        return
    built = torch.version.cuda
    if not torch.cuda.is_available():
        if not _DRIVER.is_dir():
            yield Finding("gpu", "none; calibration passes run on the CPU")
        elif built is None and torch.version.hip is None:
            yield Finding(
                "gpu",
                "there is an NVIDIA driver, but torch is built for CPUs only",
                State.ADVICE,
                "calibration passes are far slower on a CPU; install torch for CUDA (pytorch.org)",
            )
        else:
            yield Finding(
                "gpu",
                f"there is an NVIDIA driver, but torch (CUDA {built}) finds no GPU",
                State.ADVICE,
                "check CUDA_VISIBLE_DEVICES, nvidia-smi and the version of the driver",
            )
        return
    yield Finding("cuda", f"torch {torch.__version__} is built for {built or torch.version.hip}")
    for index in range(torch.cuda.device_count()):
        yield _gpu(index)


def _gpu(index: int) -> Finding:
    import torch

    what = f"gpu {index}"
    try:
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
    except RuntimeError as error:
        problem = str(error).splitlines()[0]
        return Finding(what, f"does not respond ({problem})", State.ADVICE, "is it in use or lost?")
    return Finding(what, f"{name}, {size(free)} of {size(total)} free")


def flash_linear_attention() -> Finding:
    """The GPU kernels for the linear attention of Qwen3-Next and Qwen3.5."""
    found = installed_version()
    if found is not None:
        return Finding(PACKAGE, found)
    return Finding(
        PACKAGE,
        "not installed",
        State.ABSENT,
        f"without it a GPU runs DeltaNet (Qwen3-Next, Qwen3.5) at {REFERENCE_SPEED} the speed: "
        + install_command("gpu"),
    )


def processors() -> Finding:
    """Threads that this process may use."""
    usable, there = available_threads(), os.cpu_count() or 1
    return Finding("processors", f"{usable} usable" + (f" of {there}" if usable < there else ""))


def memory() -> Finding:
    """Free memory, within the limit of a container."""
    total = total_bytes()
    limit = ", the limit of this container" if total == container_limit() else ""
    return Finding("memory", f"{size(available_bytes())} of {size(total)} free{limit}")


def disks() -> Iterator[Finding]:
    """Free space for bundles, downloads and temporary files."""
    yield _disk("disk here", Path.cwd(), "for bundles; pass another --output")
    cache = _hub_cache()
    if cache is not None:
        yield _disk("disk of Hub cache", cache, "for models of the Hub; set HF_HOME")
    yield _disk("disk of temp", Path(tempfile.gettempdir()), "for temporary files; set TMPDIR")


def _disk(what: str, folder: Path, advice: str) -> Finding:
    """Free space in a folder, or in the nearest parent that exists."""
    existing = next((path for path in (folder, *folder.parents) if path.is_dir()), Path("/"))
    try:
        usage = shutil.disk_usage(existing)
    except OSError as error:
        return Finding(what, f"unknown ({error.strerror}): {folder}", State.ADVICE, advice)
    found = f"{size(usage.free)} of {size(usage.total)} free, {folder}"
    if not os.access(existing, os.W_OK):
        return Finding(what, f"{found}, not writable", State.ADVICE, advice)
    if usage.free < _LITTLE_DISK:
        return Finding(what, found, State.ADVICE, f"little space {advice}")
    return Finding(what, found)


def hub_endpoint() -> Finding:
    """Where models are fetched from, and whether HF_HUB_OFFLINE forbids it."""
    if importlib.util.find_spec("huggingface_hub") is None:
        return Finding("hub", "huggingface_hub is missing", State.PROBLEM)
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return Finding(
            "hub",
            f"{constants.ENDPOINT}, not used: HF_HUB_OFFLINE is set",
            State.ADVICE,
            "only models in the cache are found; unset HF_HUB_OFFLINE to fetch others",
        )
    return Finding("hub", f"{constants.ENDPOINT}, not contacted now; HF_HUB_OFFLINE is not set")


def hub_token() -> Finding:
    """Whether there is a token, for publishing and for gated models; never the token itself."""
    if importlib.util.find_spec("huggingface_hub") is None:
        return Finding("hub token", "huggingface_hub is missing", State.PROBLEM)
    from huggingface_hub import get_token

    if get_token() is not None:
        return Finding("hub token", "a token was found")
    return Finding(
        "hub token",
        "none",
        State.ABSENT,
        "not needed for public models; to publish, or for gated models: hf auth login",
    )


def _hub_cache() -> Path | None:
    if importlib.util.find_spec("huggingface_hub") is None:
        return None
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)
