"""What a user asks of a build, as one value."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from reap2gguf.machine import available_threads


@dataclass(frozen=True)
class CalibrationOptions:
    """Which texts a sweep reads, and how they are cut."""

    spec: str = "default"
    samples: int | None = None  # rows at most, in all; None: as many as the spec says, else 1024
    max_length: int | None = None  # tokens a row, at most; None: the mix's own, else 2048
    seed: int = 42
    pack: bool | None = None  # samples one after another in a row; None: as the mix says, else no


@dataclass(frozen=True)
class Resume:
    """Where a sweep keeps what is done between two layers, and the key of what it is done with."""

    path: Path
    key: str


@dataclass(frozen=True)
class ComputeOptions:
    """Where the work runs."""

    device: str = "auto"
    dtype: str = "auto"
    threads: int = field(default_factory=available_threads)
    memory: int | None = None  # bytes a sweep may take of the GPU, or of the host without one
    spool: str = "auto"  # where hidden states wait: auto, device, host or disk
    scratch: Path = Path()  # folder for a spool on disk
    resume: Resume | None = None  # None: an interrupted sweep begins anew

    @property
    def likely_device(self) -> str:
        """cpu or cuda: what `auto` will come to, found out without loading torch."""
        if self.device != "auto":
            return self.device
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
        return "cuda" if Path("/proc/driver/nvidia").exists() and not hidden else "cpu"

    @property
    def likely_dtype(self) -> str:
        """float32 or bfloat16: what `auto` will come to on that device."""
        if self.dtype != "auto":
            return self.dtype
        return "bfloat16" if self.likely_device == "cuda" else "float32"


@dataclass(frozen=True)
class BuildOptions:
    """The arguments of `build` and `plan`."""

    recipes: tuple[str, ...]
    model: str | None = None
    keep_experts: int | None = None
    compression: float | None = None
    output: Path = Path("build")
    name: str | None = None
    method: str = "reap"
    mtp: str = "prune"  # what becomes of a multi-token-prediction block: prune or drop
    calibration: CalibrationOptions = CalibrationOptions()
    imatrix_text: Path | None = None
    chunk: int = 512  # tokens a chunk of the importance matrix
    compute: ComputeOptions = field(default_factory=ComputeOptions)
    fresh: bool = False
    check_space: bool = True  # whether the disk is asked for room before the work
