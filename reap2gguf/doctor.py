"""What this machine has for the work, and what is missing for what."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from reap2gguf import __version__
from reap2gguf.errors import DependencyError
from reap2gguf.ggml import load_ggml
from reap2gguf.observe.deltanet import REFERENCE_SPEED
from reap2gguf.options import available_threads
from reap2gguf.resources import shipped_folder

_REQUIRED = (
    "torch", "transformers", "tokenizers", "jinja2", "safetensors", "gguf", "huggingface_hub",
)  # fmt: skip
_OPTIONAL = {
    "llama-cpp-python": "not needed to build; runs GGUF files here: pip install 'reap2gguf[llama]'",
    "flash-linear-attention": (
        f"without it a GPU observes Qwen3.5's DeltaNet at {REFERENCE_SPEED} the speed: "
        "pip install 'reap2gguf[gpu]'"
    ),
}


@dataclass(frozen=True)
class Finding:
    """One line of a diagnosis; `is_problem` where something needed is missing."""

    what: str
    found: str
    is_problem: bool = False


def diagnose() -> Iterator[Finding]:
    """Everything that a build depends on, one finding each."""
    yield Finding("reap2gguf", __version__)
    yield Finding("python", f"{platform.python_version()} on {platform.platform()}")
    for name in _REQUIRED:
        found = _version(name)
        yield Finding(name, found or "missing: pip install reap2gguf", found is None)
    yield _ggml()
    for name, advice in _OPTIONAL.items():
        yield Finding(name, _version(name) or f"not installed ({advice})")
    yield _gpu()
    yield Finding("processors", f"{available_threads()} usable")
    yield _memory()
    yield _disk(Path.cwd())
    yield _shipped()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _ggml() -> Finding:
    try:
        ggml = load_ggml()
    except DependencyError as error:
        return Finding("libggml", str(error), True)
    return Finding("libggml", f"{ggml.version} ({ggml.path.parent.parent.name})")


def _gpu() -> Finding:
    try:
        import torch
    except ImportError as error:
        return Finding("gpu", f"unknown: torch does not load ({error})", True)
    if not torch.cuda.is_available():
        return Finding("gpu", "none; observation runs on the CPU")
    free, total = torch.cuda.mem_get_info()
    name = torch.cuda.get_device_name()
    return Finding("gpu", f"{name}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free")


def _memory() -> Finding:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    return Finding("memory", f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free")


def _disk(folder: Path) -> Finding:
    usage = shutil.disk_usage(folder)
    return Finding("disk here", f"{usage.free / 2**30:.1f} of {usage.total / 2**30:.1f} GiB free")


def _shipped() -> Finding:
    recipes = len(list(shipped_folder("recipes").glob("*.toml")))
    texts = len(list(shipped_folder("calibration").glob("*.[tj][xs]*")))
    return Finding("shipped", f"{recipes} recipes, {texts} calibration files")
