"""What the options of a build say by themselves, checked before any model is looked at."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from reap2gguf.calibration.scanned_files import ScannedFiles
from reap2gguf.calibration.sources import check_calibration
from reap2gguf.calibration.spec import Calibration, decide
from reap2gguf.choosing.names import AUTO
from reap2gguf.errors import CalibrationError
from reap2gguf.pruning.methods import is_from_weights, merges
from reap2gguf.quantizing.labels import refuse_twice
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


def read_options(options: BuildOptions, labels: Mapping[str, str]) -> Asked:
    """What is cheap to check comes first; `labels` are those of recipes, in place of their own.

    Raises RecipeError, CalibrationError or UsageError.
    """
    overrides = read_overrides(options.tensor_types)
    recipes = load_recipes(options.recipes, labels, overrides)
    refuse_twice([recipe.label for recipe in recipes])
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
    is_merged = merges(options.method) and options.kept is None
    if (options.repair != "none" or is_merged) and options.compression != 0:
        return True
    if options.imatrix is None and options.imatrix_text is None:
        if is_from_weights(options.method) or options.kept is not None:
            return True
        ranks = options.observations is None or options.method == AUTO
        return options.imatrix_from == "pruned" or ranks
    if is_from_weights(options.method) or options.kept is not None:
        return False
    ranks = options.observations is None or options.method == AUTO
    return ranks and options.compression != 0


def _check_there(text: Path) -> None:
    """Refuse a missing text before anything else is read."""
    if not os.path.exists(os.path.expanduser(text)):
        raise CalibrationError(f"{text}: no such file; pass a text file")
