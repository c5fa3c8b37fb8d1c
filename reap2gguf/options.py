"""The options of a build, each group as one value.

A value that no build can use is refused where it is made, with a UsageError. So callers from Python
get the same checks as the command line.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TypeVar

from reap2gguf.choosing.names import AUTO, BUILD_METHODS, check_build_candidates
from reap2gguf.errors import ParameterError, UsageError
from reap2gguf.fitting.target import (
    DEFAULT_SENSITIVITY,
    SENSITIVITIES,
    WEIGHED_SENSITIVITY,
    SizeTarget,
)
from reap2gguf.machine import available_threads
from reap2gguf.pruning.counts import WEIGHED, check_asked, check_counts, check_weighed
from reap2gguf.pruning.protection import Protection, read_pinned
from reap2gguf.quantizing.named import (
    DEFAULT_RECIPES,
    RecipeText,
    check_labels,
    check_tensor_types,
    named_recipes,
)

MTP_CHOICES = ("prune", "drop")
REPAIR_CHOICES = ("none", "ridge", "scale")
IMATRIX_FROM_CHOICES = ("pruned", "source")
DEQUANTIZE_CHOICES = ("bf16",)
EVALUATE_CHOICES = ("auto", "always", "never")
DEVICES = ("auto", "cpu", "cuda")
DTYPES = ("auto", "float32", "bfloat16")
SPOOLS = ("auto", "device", "host", "disk")
MOST_THREADS = 1024


class CheckQuants(Enum):
    """How much of what the compiled kernels quantize is compared with libggml's bytes."""

    ALL = "all"
    SAMPLE = "sample"  # one super-block in a thousand
    NONE = "none"

    @property
    def share(self) -> float:
        """The share of super-blocks, from 0 to 1."""
        return {"all": 1.0, "sample": 0.001, "none": 0.0}[self.value]


_Kind = TypeVar("_Kind")


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise UsageError for a value that is not one of the choices."""
    if value not in choices:
        raise ParameterError(f"{name} is {value!r}, expected one of {', '.join(choices)}", name)


def check_number(name: str, value: object, low: int, high: int = 2**31 - 1) -> int:
    """The same number. Raise UsageError if it is not a whole number from `low` to `high`."""
    if isinstance(value, int) and not isinstance(value, bool) and low <= value <= high:
        return value
    raise ParameterError(
        f"{name} is {value!r}, expected a whole number from {low} to {high:,}", name
    )


def check_quants_of(value: object) -> CheckQuants:
    """How much is compared, from its name too. Raise UsageError for anything else."""
    if isinstance(value, CheckQuants):
        return value
    check_choice("check_quants", value, tuple(one.value for one in CheckQuants))
    return CheckQuants(value)


def check_bool(name: str, value: object) -> None:
    """Raise UsageError for a value that is neither True nor False."""
    if not isinstance(value, bool):
        raise ParameterError(f"{name} is {value!r}, expected True or False", name)


def check_kind(name: str, value: object, kind: type) -> None:
    """Raise UsageError for a value that is not of a class."""
    if not isinstance(value, kind):
        raise ParameterError(f"{name} is {value!r}, expected a value of {kind.__name__}", name)


def given_or_new(name: str, value: _Kind | None, kind: type[_Kind]) -> _Kind:
    """Options, or their defaults for None. Raise UsageError for a value of another class."""
    if value is None:
        return kind()
    check_kind(name, value, kind)
    return value


def check_threads(threads: object) -> int:
    """A number of threads, or all that are available for None. Raise UsageError for others."""
    if threads is None:
        return available_threads()
    return check_number("threads", threads, 1, MOST_THREADS)


def check_path(name: str, value: object) -> Path:
    """A path from a text or a path. Raise UsageError for anything else, and for NUL characters."""
    text = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    if not isinstance(text, str) or "\0" in text:
        raise ParameterError(f"{name} is {value!r}, expected a path", name)
    return Path(text)


@dataclass(frozen=True)
class CalibrationOptions:
    """Which texts a calibration pass reads, and how they are cut into rows."""

    spec: str = "default"
    samples: int | None = None  # most rows; None: as many as the spec says, else 1024
    max_length: int | None = None  # most tokens per row; None: the mix's own, else 2048
    seed: int = 42
    pack: bool | None = None  # several samples per row; None: as the mix says, else no
    # dataset on the Hub -> commit to read, where the spec pins none
    revisions: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.spec, str | os.PathLike):
            raise ParameterError(
                f"spec is {self.spec!r}, expected a mix, a dataset or a path", "spec"
            )
        object.__setattr__(self, "spec", str(self.spec))
        if self.samples is not None:
            check_number("samples", self.samples, 1)
        if self.max_length is not None:
            check_number("max_length", self.max_length, 2)
        check_number("seed", self.seed, -(2**31 - 1))
        if self.pack is not None:
            check_bool("pack", self.pack)
        check_kind("revisions", self.revisions, Mapping)


@dataclass(frozen=True)
class Resume:
    """Where a sweep saves its state between two layers, and the key of its inputs.

    A sweep resumes only from a state with the same key, and of the same versions: one sweep is not
    computed half by one version of torch and half by another.
    """

    path: Path
    key: str
    made_with: Mapping[str, str] = field(default_factory=dict)  # versions of what computes


@dataclass(frozen=True)
class ComputeOptions:
    """Where and how the work is computed."""

    device: str = "auto"  # auto, cpu or cuda
    dtype: str = "auto"  # auto, float32 or bfloat16
    threads: int = field(default_factory=available_threads)
    memory: int | None = None  # most bytes of the GPU, or of RAM on a CPU; None: what is free
    spool: str = "auto"  # where activations wait between layers: auto, device, host or disk
    check_quants: CheckQuants = CheckQuants.SAMPLE  # what kernels quantized, with libggml's bytes
    scratch: Path = Path()  # folder for a spool on disk
    resume: Resume | None = None  # None: an interrupted sweep starts from the first layer

    def __post_init__(self) -> None:
        check_choice("device", self.device, DEVICES)
        check_choice("dtype", self.dtype, DTYPES)
        check_choice("spool", self.spool, SPOOLS)
        check_number("threads", self.threads, 1, MOST_THREADS)
        if self.memory is not None:
            check_number("memory", self.memory, 1, 2**63)
        object.__setattr__(self, "check_quants", check_quants_of(self.check_quants))
        object.__setattr__(self, "scratch", check_path("scratch", self.scratch))

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

    recipes: tuple[str | RecipeText, ...] = DEFAULT_RECIPES  # with a target size, what is named
    model: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)  # by recipe, in place of its own
    keep_experts: int | None = None
    compression: float | str | None = None  # a share of the experts, or WEIGHED
    output: Path = Path("build")
    name: str | None = None
    method: str = "reap"  # a criterion, or auto: the best of `candidates`
    candidates: tuple[str, ...] | None = None  # methods that auto measures; None: CANDIDATES
    choose_text: Path | None = None  # of another domain, for auto; None: texts of this program
    protect: str = ""  # LAYER:EXPERT,... that stay whatever they score
    protect_super_experts: bool = False  # whether experts with outliers in their outputs stay
    mtp: str = "prune"  # what to do with a multi-token-prediction block: prune or drop
    repair: str = "none"  # how the kept experts make up for the others: none, ridge or scale
    group_size: int | None = None  # experts of a group of the method ream; None: GROUP_SIZE
    dequantize: str | None = None  # type of a quantized source's safetensors; None: as it has them
    calibration: CalibrationOptions = CalibrationOptions()
    kept: Path | None = None  # a map of the experts that stay, such as `prune` writes
    observations: Path | None = None  # that `observe` wrote: they take the place of that stage
    imatrix: Path | None = None  # .gguf or .dat, in place of the one that would be computed
    imatrix_from: str = "pruned"  # the model whose sums are taken; source: as it is ranked
    imatrix_text: Path | None = None
    chunk: int = 512  # tokens per chunk of the importance matrix
    imatrix_chunks: int | None = None  # most chunks; None: as many tokens as rows may have
    compute: ComputeOptions = field(default_factory=ComputeOptions)
    fresh: bool = False
    replace: bool = False  # delete GGUF files of the finished bundle that are not asked for
    check_space: bool = True  # whether free disk space is checked before the work
    follow_links: bool = False  # whether weights in a folder may be links to any place
    tensor_types: tuple[str, ...] = ()  # PATTERN=TYPE each, before the rules of every recipe
    target_size: int | None = None  # bytes of a file whose types are chosen in the build
    target_bpw: float | None = None  # bits per weight
    fit: int | None = None  # bytes of a GPU's memory
    fit_context: int | None = None  # tokens that it holds beside the file; None: 8192
    # how errors of tensors are weighed: table or measured; None: as is best for each purpose
    sensitivity: str | None = None
    evaluate: str = "auto"  # whether quality is measured: auto, always or never

    def __post_init__(self) -> None:
        has_target = self.target is not None  # or raises UsageError
        named = () if has_target and self.recipes is DEFAULT_RECIPES else self.recipes
        object.__setattr__(self, "recipes", named_recipes(named, may_be_none=has_target))
        object.__setattr__(self, "tensor_types", check_tensor_types(self.tensor_types))
        object.__setattr__(self, "labels", check_labels(self.labels))
        if self.model is not None:
            object.__setattr__(self, "model", str(self.model))
        if self.name is not None:
            check_kind("name", self.name, str)
        check_counts(self.keep_experts, None if self.weighs else self.compression)
        check_kind("calibration", self.calibration, CalibrationOptions)
        check_kind("compute", self.compute, ComputeOptions)
        for name in ("fresh", "replace", "check_space", "follow_links", "protect_super_experts"):
            check_bool(name, getattr(self, name))
        check_choice("method", self.method, BUILD_METHODS)
        self._check_choosing()
        if self.weighs:
            check_weighed(self.method, self.keep_experts, has_target, self.kept)
        read_pinned(self.protect)
        choices = MTP_CHOICES, REPAIR_CHOICES, EVALUATE_CHOICES, IMATRIX_FROM_CHOICES
        for name, known in zip(("mtp", "repair", "evaluate", "imatrix_from"), choices, strict=True):
            check_choice(name, getattr(self, name), known)
        check_asked(self.method, self.repair, self.group_size)
        if self.dequantize is not None:
            check_choice("dequantize", self.dequantize, DEQUANTIZE_CHOICES)
        if self.sensitivity is not None:
            check_choice("sensitivity", self.sensitivity, SENSITIVITIES)
        check_number("chunk", self.chunk, 8)
        if self.imatrix_chunks is not None:
            check_number("imatrix_chunks", self.imatrix_chunks, 1)
        object.__setattr__(self, "output", check_path("output", self.output))
        for name in ("kept", "observations", "imatrix", "imatrix_text", "choose_text"):
            if (path := getattr(self, name)) is not None:
                object.__setattr__(self, name, check_path(name, path))
        for name in ("imatrix", "imatrix_text", "imatrix_chunks"):
            if self.imatrix_from == "source" and getattr(self, name) is not None:
                raise UsageError(
                    f"--imatrix-from source and --{name.replace('_', '-')} exclude each other: its "
                    "sums are of the calibration rows; leave one of them out"
                )
        if self.imatrix is not None and self.imatrix_text is not None:
            raise UsageError("--imatrix and --imatrix-text exclude each other; pass one of them")

    @property
    def target(self) -> SizeTarget | None:
        """The size of a file whose types are chosen; None if none is asked for."""
        return SizeTarget.of(self.target_size, self.target_bpw, self.fit, self.fit_context)

    @property
    def fit_sensitivity(self) -> str:
        """How errors of tensors are weighed where the types of a file are chosen."""
        return self.sensitivity or DEFAULT_SENSITIVITY

    @property
    def weigh_sensitivity(self) -> str:
        """The same where experts are weighed against bits."""
        return self.sensitivity or WEIGHED_SENSITIVITY

    @property
    def weighs(self) -> bool:
        """Whether the build finds how many experts stay, by what each number costs."""
        return self.compression == WEIGHED

    @property
    def ratio(self) -> float | None:
        """The share of the experts that is removed, where a number was given."""
        return None if isinstance(self.compression, str) else self.compression

    @property
    def protection(self) -> Protection:
        """The experts that stay whatever they score."""
        return Protection(read_pinned(self.protect), self.protect_super_experts)

    def _check_choosing(self) -> None:
        """Candidates by name; refuse what has no effect without `auto`."""
        if self.candidates is not None:
            object.__setattr__(self, "candidates", check_build_candidates(self.candidates))
        needless = () if self.method == AUTO else ("candidates", "choose_text")
        for name in needless[: 1 if self.weighs else 2]:
            if getattr(self, name) is not None:
                raise ParameterError(
                    f"{name} is for the method auto; pass it, or leave this out", name
                )


@dataclass(frozen=True)
class AddOptions:
    """The arguments of `add`."""

    bundle: Path  # either folder of a finished bundle
    recipes: tuple[str | RecipeText, ...] = ()  # of files to write
    files: tuple[Path, ...] = ()  # GGUF files that are there already
    labels: Mapping[str, str] = field(default_factory=dict)  # by recipe or file
    source: str | None = None  # the model, where the bundle has no safetensors
    exact: bool = False  # whether what was written is quantized again and compared by bytes
    compute: ComputeOptions = field(default_factory=ComputeOptions)  # what quantizes, and where

    def __post_init__(self) -> None:
        check_kind("compute", self.compute, ComputeOptions)
        object.__setattr__(self, "bundle", check_path("bundle", self.bundle))
        recipes = named_recipes(self.recipes) if self.recipes else ()
        object.__setattr__(self, "recipes", recipes)
        files = tuple(check_path("files", path) for path in self.files)
        object.__setattr__(self, "files", files)
        object.__setattr__(self, "labels", check_labels(self.labels))
        check_bool("exact", self.exact)
        if not recipes and not files:
            raise UsageError("nothing to add: pass a recipe, such as q8_0, or a GGUF file")
