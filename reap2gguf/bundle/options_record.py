"""The options of a build as its manifest records them, so that `--like` can take them over.

Names of fields are those of the options: of BuildOptions, CalibrationOptions and ComputeOptions.
Recipes are not among them: each GGUF's own record holds its recipe's text and label.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# options that name local files
CALIBRATION_OPTION = "--calibration"
IMATRIX_TEXT_OPTION = "--imatrix-text"
KEPT_OPTION = "--kept"
OBSERVATIONS_OPTION = "--observations"
IMATRIX_OPTION = "--imatrix"
CHOOSE_TEXT_OPTION = "--choose-text"


@dataclass(frozen=True)
class InputRecord:
    """A local file that decided the result: the option that named it, its name and its hash."""

    option: str
    name: str  # the last part of its path: a card is public
    sha256: str


@dataclass(frozen=True)
class OptionsRecord:
    """What was asked for, and what `auto` and defaults meant."""

    keep_experts: int | None
    compression: float | None
    name: str | None  # None: made from the source's
    method: str
    mtp: str
    spec: str  # of the calibration; paths are cut to their last part
    samples: int
    max_length: int
    seed: int
    pack: bool
    observations: str | None  # the last part of its path, as of the two below
    imatrix: str | None
    imatrix_text: str | None
    chunk: int
    imatrix_chunks: int | None
    device: str
    dtype: str
    inputs: Sequence[InputRecord] = ()
    repair: str = "none"
    kept: str | None = None  # the last part of its path
    dequantize: str | None = None  # the type that a quantized source's safetensors were written in
    protect: str = ""
    protect_super_experts: bool = False
    evaluate: str = "never"  # whether quality was measured; older manifests do not say it
    imatrix_from: str = "pruned"  # older manifests do not say it
    candidates: str | None = None  # of --method auto, with commas; None: another method
    choose_text: str | None = None  # the last part of its path
    group_size: int | None = None  # of --method ream; None: another method
