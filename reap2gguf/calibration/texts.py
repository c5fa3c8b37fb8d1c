"""Everything a build reads as text, tokenized before the first hour of work begins."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from reap2gguf.calibration.corpus import load_corpus, read_text
from reap2gguf.calibration.rows import Row, Tokenizer, chunk_text, make_rows
from reap2gguf.options import CalibrationOptions


@dataclass(frozen=True)
class ObservationRows:
    """Rows for the observation, and where they come from."""

    label: str  # the spec; of a path, only its name, since cards are public
    sha256: str
    rows: Sequence[Row]


@dataclass(frozen=True)
class ImatrixChunks:
    """Chunks for the importance matrix, and the text they were cut from."""

    label: str
    text: str
    chunk_size: int
    chunks: Sequence[Row]

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode("utf-8")).hexdigest()


def observation_rows(
    tokenizer: Tokenizer, options: CalibrationOptions, max_length: int
) -> ObservationRows:
    """Rows of a calibration spec. Raises CalibrationError."""
    corpus = load_corpus(options.spec, tokenizer.render_chat)
    rows = make_rows(corpus, tokenizer, max_length, options.samples, options.seed)
    return ObservationRows(_public(options.spec), corpus.sha256, rows)


def imatrix_chunks(
    tokenizer: Tokenizer, text_file: Path | None, spec: str, chunk_size: int
) -> ImatrixChunks:
    """Chunks of a text file, or of the calibration corpus where none is given."""
    if text_file is None:
        label, text = _public(spec), load_corpus(spec, tokenizer.render_chat).text()
    else:
        label, text = text_file.name, read_text(text_file)
    return ImatrixChunks(label, text, chunk_size, chunk_text(text, tokenizer, chunk_size, label))


def _public(spec: str) -> str:
    return Path(spec).name if Path(spec).exists() else spec
