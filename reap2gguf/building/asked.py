"""What the options of a build say by themselves, checked before any model is looked at."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from reap2gguf.calibration.scanned_files import ScannedFiles
from reap2gguf.calibration.sources import check_calibration
from reap2gguf.calibration.spec import Calibration, decide
from reap2gguf.choosing.names import AUTO
from reap2gguf.errors import CalibrationError, UsageError
from reap2gguf.pruning.methods import is_from_weights
from reap2gguf.quantizing.labels import twice
from reap2gguf.quantizing.overrides import read_overrides
from reap2gguf.quantizing.recipe import load_recipes

if TYPE_CHECKING:
    from reap2gguf.options import BuildOptions
    from reap2gguf.quantizing.recipe import Recipe


@dataclass(frozen=True)
class Asked:
    """What the options say by themselves, before any model is looked at."""

    recipes: Sequence[Recipe]
    calibration: Calibration
    files: ScannedFiles
    is_checked: bool  # whether the calibration has been checked


def read_options(options: BuildOptions) -> Asked:
    """What is cheap to check comes first. Raises RecipeError, CalibrationError or UsageError."""
    overrides = read_overrides(options.tensor_types)
    recipes = load_recipes(options.recipes, options.labels, overrides)
    if same := twice([recipe.label for recipe in recipes]):
        labels = " and ".join(map(repr, dict.fromkeys(same)))
        raise UsageError(
            f"two recipes have the label {labels} and so the same file name (where capitals do "
            "not count, as on macOS); give one of them another with --label RECIPE=LABEL"
        )
    calibration, files = decide(options.calibration), ScannedFiles()
    if is_checked := _surely_reads(options):
        check_calibration(calibration, files)
    for text in (options.imatrix_text, options.choose_text):
        if text is not None:
            _check_there(text)
            files.text(text)
    return Asked(recipes, calibration, files, is_checked)


def _surely_reads(options: BuildOptions) -> bool:
    """Whether a build reads its calibration whatever the model is."""
    if options.imatrix is None and options.imatrix_text is None:
        return True
    if options.repair != "none" and options.compression != 0:
        return True
    if is_from_weights(options.method):
        return False
    ranks = options.observations is None or options.method == AUTO
    return ranks and options.compression != 0


def _check_there(text: Path) -> None:
    """Refuse a missing text before anything else is read."""
    if not os.path.exists(os.path.expanduser(text)):
        raise CalibrationError(f"{text}: no such file; pass a text file")
