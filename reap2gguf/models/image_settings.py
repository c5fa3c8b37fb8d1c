"""How images are normalized before a vision tower sees them, by the files beside its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reap2gguf.checkpoint.config import read_json
from reap2gguf.errors import CheckpointError, UnsupportedModelError
from reap2gguf.messages import shown

_MOST_BRIGHT = 2**16  # of a mean or deviation; most are between 0 and 1
PREPROCESSOR = "preprocessor_config.json"
PROCESSOR = "processor_config.json"  # what transformers 5 writes
_IN_PROCESSOR = "image_processor"  # its key for what PREPROCESSOR holds
_IMAGE_KEYS = ("image_mean", "image_std")


@dataclass(frozen=True)
class ImageSettings:
    """How images are normalized before the tower sees them: one number for each colour."""

    mean: list[float]
    deviation: list[float]
    notes: tuple[str, ...] = ()


def read_image_settings(folder: Path) -> ImageSettings:
    """The settings that transformers and llama.cpp's converter use, from either of two files.

    Both take `image_processor` in PROCESSOR, which transformers 5 writes, before PREPROCESSOR. If
    the two disagree, a note says so. Raises CheckpointError if there is neither, and
    UnsupportedModelError if a value is missing or not three numbers, or if the two programs would
    take different ones.
    """
    old = read_json(folder / PREPROCESSOR) if (folder / PREPROCESSOR).is_file() else None
    processor = read_json(folder / PROCESSOR) if (folder / PROCESSOR).is_file() else {}
    new = processor.get(_IN_PROCESSOR)
    where = f"{folder / PROCESSOR}: {_IN_PROCESSOR}"
    if new is not None and not isinstance(new, dict):
        raise UnsupportedModelError(f"{where} is {shown(new)}, expected an object")
    if new is None and old is None:
        raise CheckpointError(
            f"{folder}: the vision tower needs {PREPROCESSOR}, or {_IN_PROCESSOR} in {PROCESSOR}, "
            "for its image mean and deviation"
        )
    if new is None and (both := [key for key in _IMAGE_KEYS if key in processor]):
        # the converter reads these, and transformers does not
        raise UnsupportedModelError(
            f"{folder / PROCESSOR}: has {both[0]} outside {_IN_PROCESSOR}; move it into "
            f"{_IN_PROCESSOR}, or remove it"
        )
    images = old if new is None else new
    where = str(folder / PREPROCESSOR) if new is None else where
    mean, deviation = (_three(images or {}, key, where) for key in _IMAGE_KEYS)
    other = old or {}
    notes = tuple(
        f"{folder / PREPROCESSOR}: {key} is {shown(other[key])}, but {where} has "
        f"{shown(images[key])}, which transformers and llama.cpp prefer; it is used"
        for key in _IMAGE_KEYS
        if new is not None and images is not None and key in other and other[key] != images[key]
    )
    return ImageSettings(mean, deviation, notes)


def _three(images: Mapping[str, Any], key: str, where: str) -> list[float]:
    values = images.get(key)
    if (
        not isinstance(values, list)
        or len(values) != 3
        or not all(isinstance(v, int | float) and abs(v) <= _MOST_BRIGHT for v in values)
        or any(isinstance(v, bool) for v in values)
    ):
        raise UnsupportedModelError(f"{where}: {key} is {shown(values)}, expected three numbers")
    return [float(value) for value in values]
