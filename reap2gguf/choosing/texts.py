"""The texts that candidates are measured on, as rows of which the second half is scored."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from reap2gguf.artifacts.texts import hash_rows
from reap2gguf.calibration.rows import chunk_text
from reap2gguf.calibration.scanned_files import ScannedFiles
from reap2gguf.calibration.spec import DEFAULT_MIX
from reap2gguf.choosing.amounts import CHUNK, MOST_CHUNKS
from reap2gguf.errors import CalibrationError
from reap2gguf.evaluating.scores import ScoredRow
from reap2gguf.resources import shipped_folder

if TYPE_CHECKING:
    from reap2gguf.artifacts.texts import Row
    from reap2gguf.calibration.spec import Calibration
    from reap2gguf.tokenizer.tokenizer import Tokenizer

# what few calibrations are made of; code and structured text are what many are made of
EMBEDDED = ("prose.txt", "mathematics.txt", "science.txt", "languages.txt")
EMBEDDED_LABEL = "embedded: prose, mathematics, science, languages"
ONLY_HELD_OUT = (
    "the calibration is the embedded text itself, so no text of another domain is measured; pass "
    "one with --choose-text"
)


@dataclass(frozen=True)
class MeasuredText:
    """A text of a measurement."""

    label: str
    rows: Sequence[ScoredRow]

    @property
    def sha256(self) -> str:
        """The hash of all tokens."""
        digest = hashlib.sha256()
        hash_rows(digest, [row.tokens for row in self.rows])
        return digest.hexdigest()


def scored_half(row: Row) -> ScoredRow:
    """A row of at least 2 tokens, of which the second half is scored, but for its first token."""
    return ScoredRow(row, max(1, min(len(row) // 2 + 1, len(row) - 1)))


def held_out_text(label: str, held: Sequence[Row]) -> MeasuredText:
    """The rows of a calibration that were held out."""
    return MeasuredText(f"held-out rows of {label}", [scored_half(row) for row in held])


def other_text(
    path: Path | None, calibration: Calibration, tokenizer: Tokenizer, vocabulary: int, context: int
) -> MeasuredText | None:
    """The text of another domain: a file, or texts that travel with the package.

    None if those texts are the calibration and there is no file. Raises CalibrationError.
    """
    size = min(CHUNK, context)
    if path is not None:
        text = ScannedFiles().text(path.expanduser()).text()
        return _checked(path.name, chunk_text(text, tokenizer, size, path.name), vocabulary)
    if any(one.name == DEFAULT_MIX for one in calibration.components):
        return None
    return embedded_text(tokenizer, vocabulary, size, MOST_CHUNKS)


def embedded_text(tokenizer: Tokenizer, vocabulary: int, size: int, n_chunks: int) -> MeasuredText:
    """About so many chunks of `size` tokens of the texts that travel with the package."""
    folder, chunks = shipped_folder("calibration"), list[Sequence["Row"]]()
    for name in EMBEDDED:
        text = (folder / name).read_text(encoding="utf-8")
        found = chunk_text(text, tokenizer, size, name)
        chunks.append(_some(found, n_chunks // len(EMBEDDED)))
    return _checked(EMBEDDED_LABEL, [row for part in chunks for row in part], vocabulary)


def _checked(label: str, chunks: Sequence[Row], vocabulary: int) -> MeasuredText:
    """Some of the chunks, spread evenly. Raises CalibrationError for too few, or other tokens."""
    if len(chunks) < 2:
        raise CalibrationError(
            f"{label}: 1 chunk of {len(chunks[0]):,} tokens, expected at least 2; pass more text "
            "as --choose-text"
        )
    highest = max(int(chunk.max()) for chunk in chunks)
    if highest >= vocabulary:
        raise CalibrationError(
            f"{label}: the tokenizer gives id {highest}, but the model's vocab_size is "
            f"{vocabulary}; use the tokenizer of this model"
        )
    return MeasuredText(label, [scored_half(row) for row in _some(chunks, MOST_CHUNKS)])


def _some(chunks: Sequence[Row], most: int) -> Sequence[Row]:
    """At most so many of the chunks, from all of their text."""
    count = min(most, len(chunks))
    return [chunks[(2 * number + 1) * len(chunks) // (2 * count)] for number in range(count)]
