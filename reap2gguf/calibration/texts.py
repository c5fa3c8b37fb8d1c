"""Everything a build reads as text, tokenized before the first hour of work begins."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from reap2gguf.bundle.manifest import ComponentRecord, component_records
from reap2gguf.calibration.corpus import read_text
from reap2gguf.calibration.drawing import Drawn, draw
from reap2gguf.calibration.mixes import Calibration
from reap2gguf.calibration.rows import Row, Tokenizer, chunk_text
from reap2gguf.checkpoint.safetensors_header import read_header, read_metadata
from reap2gguf.checkpoint.writer import write_arrays
from reap2gguf.errors import ArtifactError, CalibrationError, CheckpointError
from reap2gguf.progress import Progress, Silent

SILENT = Silent()


@dataclass(frozen=True)
class ObservationRows:
    """Rows for the observation, and where they come from."""

    label: str  # the spec; of a path, only its name, since cards are public
    sha256: str
    rows: Sequence[Row]
    components: tuple[ComponentRecord, ...] = ()


@dataclass(frozen=True)
class ImatrixChunks:
    """Chunks for the importance matrix, and the text they were cut from."""

    label: str
    text: str
    chunk_size: int
    chunks: Sequence[Row]

    @property
    def sha256(self) -> str:
        """Of the text; the chunks may be fewer than it has."""
        return hashlib.sha256(self.text.encode("utf-8")).hexdigest()

    @property
    def tokens_sha256(self) -> str:
        """Of the chunks: another tokenizer or another number of them makes another."""
        digest = hashlib.sha256()
        _hash_rows(digest, self.chunks)
        return digest.hexdigest()


@dataclass(frozen=True)
class Texts:
    """What both sweeps of a build read."""

    rows: ObservationRows
    chunks: ImatrixChunks

    def save(self, path: Path) -> None:
        """Write a safetensors file, whole or not at all; OutputError if the disk refuses."""
        arrays = {
            **_packed("rows", self.rows.rows),
            **_packed("chunks", self.chunks.chunks),
            "text": np.frombuffer(self.chunks.text.encode("utf-8"), dtype=np.uint8),
        }
        metadata = {
            "rows_label": self.rows.label,
            "rows_sha256": self.rows.sha256,
            "components": json.dumps([asdict(record) for record in self.rows.components]),
            "chunks_label": self.chunks.label,
            "chunk_size": str(self.chunks.chunk_size),
        }
        write_arrays(path, arrays, metadata)

    @classmethod
    def load(cls, path: Path) -> Texts:
        """Read the file; ArtifactError if it is not one that `save` wrote."""
        from safetensors.numpy import load_file

        try:
            read_header(path)  # every number is bounded before anything is read
            metadata = read_metadata(path)
            arrays = load_file(path)
            rows = ObservationRows(
                metadata["rows_label"],
                metadata["rows_sha256"],
                _unpacked("rows", arrays),
                component_records(json.loads(metadata["components"])),
            )
            chunks = ImatrixChunks(
                metadata["chunks_label"],
                arrays["text"].tobytes().decode("utf-8"),
                int(metadata["chunk_size"]),
                _unpacked("chunks", arrays),
            )
        except (CheckpointError, LookupError, ValueError, TypeError, RecursionError) as error:
            raise ArtifactError(
                f"{path}: is not the tokenized text that it was ({error}); remove it and run the "
                "command again"
            ) from error
        return cls(rows, chunks)


def _packed(name: str, rows: Sequence[Row]) -> dict[str, npt.NDArray[Any]]:
    """Rows of any lengths as two arrays."""
    return {
        f"{name}.tokens": np.concatenate(rows).astype(np.int64),
        f"{name}.lengths": np.array([len(row) for row in rows], dtype=np.int64),
    }


def _unpacked(name: str, arrays: Mapping[str, npt.NDArray[Any]]) -> list[Row]:
    """The rows of two arrays; ValueError if they do not fit."""
    tokens, lengths = arrays[f"{name}.tokens"], arrays[f"{name}.lengths"]
    if lengths.sum() != len(tokens) or (lengths < 1).any():
        raise ValueError(f"{name} of {lengths.sum()} tokens, {len(tokens)} are there")
    return np.split(tokens, np.cumsum(lengths)[:-1])


def read_texts(
    tokenizer: Tokenizer,
    calibration: Calibration,
    max_length: int,
    imatrix_text: Path | None,
    chunk_size: int,
    vocab_size: int,
    progress: Progress = SILENT,
) -> Texts:
    """Rows for the observation and chunks for the importance matrix.

    Without a text of its own, the importance matrix reads the calibration texts, no more tokens of
    them than the observation may. Raises CalibrationError.
    """
    drawn = draw(calibration, tokenizer, max_length, progress)
    rows = _rows(drawn, calibration, vocab_size)
    if imatrix_text is not None:
        return Texts(rows, imatrix_chunks(tokenizer, imatrix_text, chunk_size))
    chunks = chunk_text(drawn.text, tokenizer, chunk_size, rows.label)
    n_chunks = -(-calibration.samples * max_length // chunk_size)
    return Texts(rows, ImatrixChunks(rows.label, drawn.text, chunk_size, chunks[:n_chunks]))


def observation_rows(
    tokenizer: Tokenizer,
    calibration: Calibration,
    max_length: int,
    vocab_size: int,
    progress: Progress = SILENT,
) -> ObservationRows:
    """Rows of a calibration. Raises CalibrationError."""
    drawn = draw(calibration, tokenizer, max_length, progress)
    return _rows(drawn, calibration, vocab_size)


def imatrix_chunks(tokenizer: Tokenizer, text_file: Path, chunk_size: int) -> ImatrixChunks:
    """All chunks of a text file, as llama-imatrix cuts them."""
    text = read_text(text_file)
    chunks = chunk_text(text, tokenizer, chunk_size, text_file.name)
    return ImatrixChunks(text_file.name, text, chunk_size, chunks)


def _rows(drawn: Drawn, calibration: Calibration, vocab_size: int) -> ObservationRows:
    highest = max(int(row.max()) for row in drawn.rows)
    if highest >= vocab_size:
        raise CalibrationError(
            f"calibration {calibration.label!r}: the tokenizer gives id {highest}, and the model's "
            f"vocab_size is {vocab_size}; they do not belong together"
        )
    digest = hashlib.sha256(drawn.sha256.encode())
    _hash_rows(digest, drawn.rows)  # another tokenizer, or length, makes other rows of a text
    return ObservationRows(calibration.label, digest.hexdigest(), drawn.rows, drawn.components)


def _hash_rows(digest: hashlib._Hash, rows: Sequence[Row]) -> None:
    for row in rows:
        digest.update(len(row).to_bytes(8, "little") + row.tobytes())
