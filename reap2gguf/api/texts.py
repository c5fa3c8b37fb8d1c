"""The calibration text as rows of tokens, for every function that reads it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from reap2gguf.progress import Progress, working

if TYPE_CHECKING:
    from reap2gguf.artifacts.texts import ObservationRows
    from reap2gguf.calibration.scanned_files import ScannedFiles
    from reap2gguf.calibration.spec import Calibration
    from reap2gguf.hub.opened import OpenModel


def calibration_rows(
    opened: OpenModel, calibration: Calibration, files: ScannedFiles, progress: Progress
) -> ObservationRows:
    """The rows, of a text that was checked. Raises CalibrationError, and what a tokenizer raises.

    `files` are those that the check has scanned.
    """
    opened.check_tokenizer()
    from reap2gguf.calibration.drawing import observation_rows
    from reap2gguf.tokenizer.tokenizer import Tokenizer

    facts = opened.model.facts
    length = min(calibration.max_length, facts.context_length)
    with working(progress, "Reading the calibration text"):
        tokenizer = Tokenizer(opened.source.folder)
        return observation_rows(tokenizer, calibration, length, facts.vocab_size, progress, files)
