"""The options of a build, each group as one value."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from reap2gguf.machine import available_threads


@dataclass(frozen=True)
class CalibrationOptions:
    """Which texts a calibration pass reads, and how they are cut into rows."""

    spec: str = "default"
    samples: int | None = None  # most rows; None: as many as the spec says, else 1024
    max_length: int | None = None  # most tokens per row; None: the mix's own, else 2048
    seed: int = 42
    pack: bool | None = None  # several samples per row; None: as the mix says, else no


@dataclass(frozen=True)
class Resume:
    """Where a sweep saves its state between two layers, and the key of its inputs.

    A sweep resumes only from a state with the same key.
    """

    path: Path
    key: str


@dataclass(frozen=True)
class ComputeOptions:
    """Where and how the work is computed."""

    device: str = "auto"  # auto, cpu or cuda
    dtype: str = "auto"  # auto, float32 or bfloat16
    threads: int = field(default_factory=available_threads)
    memory: int | None = None  # most bytes of the GPU, or of RAM on a CPU; None: what is free
    spool: str = "auto"  # where activations wait between layers: auto, device, host or disk
    scratch: Path = Path()  # folder for a spool on disk
    resume: Resume | None = None  # None: an interrupted sweep starts from the first layer

    @property
    def likely_device(self) -> str:
        """cpu or cuda: what `auto` will mean, found without loading torch."""
        if self.device != "auto":
            return self.device
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
        return "cuda" if Path("/proc/driver/nvidia").exists() and not hidden else "cpu"

    @property
    def likely_dtype(self) -> str:
        """float32 or bfloat16: what `auto` will mean on that device."""
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
    mtp: str = "prune"  # what to do with a multi-token-prediction block: prune or drop
    calibration: CalibrationOptions = CalibrationOptions()
    imatrix_text: Path | None = None
    chunk: int = 512  # tokens per chunk of the importance matrix
    compute: ComputeOptions = field(default_factory=ComputeOptions)
    fresh: bool = False
    check_space: bool = True  # whether free disk space is checked before the work
