"""GPU, processors, memory, disks and the Hub's settings."""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from reap2gguf.doctor.finding import Finding, State
from reap2gguf.machine import available_bytes, available_threads, container_limit, total_bytes
from reap2gguf.observing.linear_attention import PACKAGE, REFERENCE_SPEED, installed_version

_DRIVER = Path("/proc/driver/nvidia")  # there where the kernel drives an NVIDIA GPU
_LITTLE_DISK = 2**30


def gpus() -> Iterator[Finding]:
    """Each GPU that torch sees, and one that it should see and does not."""
    try:
        import torch
    except (ImportError, OSError, RuntimeError) as error:
        yield Finding("gpu", "unknown", State.PROBLEM, f"torch does not load ({error})")
        return
    built = torch.version.cuda
    if not torch.cuda.is_available():
        if not _DRIVER.is_dir():
            yield Finding("gpu", "none; experts are observed on the CPU")
        elif built is None and torch.version.hip is None:
            yield Finding(
                "gpu", "an NVIDIA driver is here, and torch is built for CPUs only", State.ADVICE,
                "observing takes far longer on the CPU; install torch for CUDA (pytorch.org)",
            )  # fmt: skip
        else:
            yield Finding(
                "gpu", f"an NVIDIA driver is here, and torch (CUDA {built}) sees no GPU",
                State.ADVICE,
                "see CUDA_VISIBLE_DEVICES, and that nvidia-smi works and its driver is new enough",
            )  # fmt: skip
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
        return Finding(what, f"cannot be asked ({problem})", State.ADVICE, "is it in use or lost?")
    return Finding(what, f"{name}, {_gib(free)} of {_gib(total)} free")


def flash_linear_attention() -> Finding:
    """The kernels of Qwen3.5's linear attention."""
    found = installed_version()
    if found is not None:
        return Finding(PACKAGE, found)
    return Finding(
        PACKAGE, "not installed", State.ABSENT,
        f"without it a GPU observes Qwen3.5's DeltaNet at {REFERENCE_SPEED} the speed: "
        "pip install 'reap2gguf[gpu]'",
    )  # fmt: skip


def processors() -> Finding:
    """Threads that this process may use."""
    usable, there = available_threads(), os.cpu_count() or 1
    return Finding("processors", f"{usable} usable" + (f" of {there}" if usable < there else ""))


def memory() -> Finding:
    """Memory that can be had, within what a container may take."""
    total, limit = total_bytes(), container_limit()
    bounded = limit is not None and limit < total
    whose = " that this container may take" if bounded else ""
    most = min(total, limit) if limit is not None else total
    return Finding("memory", f"{_gib(available_bytes())} of {_gib(most)} free{whose}")


def disks() -> Iterator[Finding]:
    """Room where bundles, downloads and scratch files go."""
    yield _disk("disk here", Path.cwd(), "for bundles; or pass --output elsewhere")
    cache = _hub_cache()
    if cache is not None:
        yield _disk("disk of Hub cache", cache, "for models of the Hub; or set HF_HOME elsewhere")
    yield _disk("disk of temp", Path(tempfile.gettempdir()), "or set TMPDIR elsewhere")


def _disk(what: str, folder: Path, advice: str) -> Finding:
    """Free room at a folder, or at the nearest one above it that is there."""
    there = next((path for path in (folder, *folder.parents) if path.is_dir()), Path("/"))
    try:
        usage = shutil.disk_usage(there)
    except OSError as error:
        return Finding(what, f"unknown ({error.strerror}): {folder}", State.ADVICE, advice)
    found = f"{_gib(usage.free)} of {_gib(usage.total)} free, {folder}"
    if not os.access(there, os.W_OK):
        return Finding(what, f"{found}, not writable", State.ADVICE, advice)
    if usage.free < _LITTLE_DISK:
        return Finding(what, found, State.ADVICE, f"little room {advice}")
    return Finding(what, found)


def hub_endpoint() -> Finding:
    """Where models are fetched from, and whether that is forbidden."""
    if importlib.util.find_spec("huggingface_hub") is None:
        return Finding("hub", "huggingface_hub is missing", State.PROBLEM)
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return Finding(
            "hub", f"{constants.ENDPOINT}, offline by HF_HUB_OFFLINE", State.ADVICE,
            "only models in the cache are found; unset HF_HUB_OFFLINE to fetch others",
        )  # fmt: skip
    return Finding("hub", f"{constants.ENDPOINT}, not asked now; HF_HUB_OFFLINE is not set")


def hub_token() -> Finding:
    """Whether there is a token, which publishing and gated models need; never which."""
    if importlib.util.find_spec("huggingface_hub") is None:
        return Finding("hub token", "huggingface_hub is missing", State.PROBLEM)
    from huggingface_hub import get_token

    if get_token() is not None:
        return Finding("hub token", "a token is there")
    return Finding(
        "hub token", "none", State.ABSENT,
        "not needed for public models; to publish, or for gated ones: hf auth login",
    )  # fmt: skip


def _hub_cache() -> Path | None:
    if importlib.util.find_spec("huggingface_hub") is None:
        return None
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _gib(n_bytes: float) -> str:
    return f"{n_bytes / 2**30:.1f} GiB"
