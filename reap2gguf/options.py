"""The options of a build, each group as one value.

A value that no build can use is refused where it is made, with a UsageError. So callers from Python
get the same checks as the command line.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from reap2gguf.errors import UsageError
from reap2gguf.machine import available_threads

METHODS = (
    "reap",
    "frequency",
    "ean_sum",
    "ean_mean",
    "weighted_ean_sum",
    "weighted_frequency",
)
MTP_CHOICES = ("prune", "drop")
DEVICES = ("auto", "cpu", "cuda")
DTYPES = ("auto", "float32", "bfloat16")
SPOOLS = ("auto", "device", "host", "disk")
MOST_THREADS = 1024


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise UsageError for a value that is not one of the choices."""
    if value not in choices:
        raise UsageError(f"{name} is {value!r}, expected one of {', '.join(choices)}")


def _check_number(name: str, value: object, low: int, high: int = 2**31 - 1) -> None:
    """Raise UsageError for a value that is not a whole number from `low` to `high`."""
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise UsageError(f"{name} is {value!r}, expected a whole number from {low} to {high:,}")


def _path(name: str, value: object) -> Path:
    if not isinstance(value, str | os.PathLike):
        raise UsageError(f"{name} is {value!r}, expected a path")
    return Path(value)


def check_labels(labels: object) -> dict[str, str]:
    """Labels by recipe. Raise UsageError if they are not a mapping of texts."""
    if isinstance(labels, Mapping):
        found = dict(labels)
        if all(isinstance(text, str) for entry in found.items() for text in entry):
            return found
    raise UsageError(f"labels is {labels!r}, expected a mapping from recipes to labels")


@dataclass(frozen=True)
class CalibrationOptions:
    """Which texts a calibration pass reads, and how they are cut into rows."""

    spec: str = "default"
    samples: int | None = None  # most rows; None: as many as the spec says, else 1024
    max_length: int | None = None  # most tokens per row; None: the mix's own, else 2048
    seed: int = 42
    pack: bool | None = None  # several samples per row; None: as the mix says, else no

    def __post_init__(self) -> None:
        object.__setattr__(self, "spec", str(self.spec))
        if self.samples is not None:
            _check_number("samples", self.samples, 1)
        if self.max_length is not None:
            _check_number("max_length", self.max_length, 2)
        _check_number("seed", self.seed, -(2**31 - 1))


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

    def __post_init__(self) -> None:
        check_choice("device", self.device, DEVICES)
        check_choice("dtype", self.dtype, DTYPES)
        check_choice("spool", self.spool, SPOOLS)
        _check_number("threads", self.threads, 1, MOST_THREADS)
        if self.memory is not None:
            _check_number("memory", self.memory, 1, 2**63)
        object.__setattr__(self, "scratch", _path("scratch", self.scratch))

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
    labels: Mapping[str, str] = field(default_factory=dict)  # by recipe, in place of its own
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
    follow_links: bool = False  # whether weights in a folder may be links to any place

    def __post_init__(self) -> None:
        recipes = (self.recipes,) if isinstance(self.recipes, str) else tuple(self.recipes)
        if not recipes:
            raise UsageError("recipes is empty, expected at least one recipe, such as q4km")
        object.__setattr__(self, "recipes", recipes)
        object.__setattr__(self, "labels", check_labels(self.labels))
        if self.model is not None:
            object.__setattr__(self, "model", str(self.model))
        if not isinstance(self.keep_experts, int | None):  # `choose_target` knows the bounds
            raise UsageError(f"keep_experts is {self.keep_experts!r}, expected a whole number")
        check_choice("method", self.method, METHODS)
        check_choice("mtp", self.mtp, MTP_CHOICES)
        _check_number("chunk", self.chunk, 8)
        object.__setattr__(self, "output", _path("output", self.output))
        if self.imatrix_text is not None:
            object.__setattr__(self, "imatrix_text", _path("imatrix_text", self.imatrix_text))
