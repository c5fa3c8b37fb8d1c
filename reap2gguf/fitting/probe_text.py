"""The text that probes are measured on: of those that travel with the package."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING

from reap2gguf.choosing.texts import embedded_text
from reap2gguf.fitting.target import PROBE_CHUNK, PROBE_CHUNKS
from reap2gguf.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:
    from pathlib import Path

    from reap2gguf.choosing.texts import MeasuredText
    from reap2gguf.models.description import ModelFacts


def probe_text(folder: Path, facts: ModelFacts) -> MeasuredText:
    """The rows, for the tokenizer in a folder. Raises CalibrationError."""
    size = min(PROBE_CHUNK, facts.context_length)
    with closing(Tokenizer(folder)) as tokenizer:
        return embedded_text(tokenizer, facts.vocab_size, size, PROBE_CHUNKS)
