"""All text that a build reads, as token ids: rows for the observation, chunks for the imatrix."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from reap2gguf.artifacts.made_with import MADE_WITH, decode, encode
from reap2gguf.bundle.manifest import ComponentRecord, component_records
from reap2gguf.checkpoint.safetensors_header import read_header, read_metadata
from reap2gguf.checkpoint.writer import check_arrays, write_arrays
from reap2gguf.errors import ArtifactError, CheckpointError

Row = npt.NDArray[np.int64]  # token ids, shape (n,)


@dataclass(frozen=True)
class ObservationRows:
    """Rows for the observation, and what they were drawn from."""

    label: str  # SPEC, with paths cut to their last part, since cards are public
    sha256: str  # of the texts and the rows
    rows: Sequence[Row]
    components: tuple[ComponentRecord, ...] = ()


@dataclass(frozen=True)
class ImatrixChunks:
    """Chunks for the importance matrix, in the order of the text they were cut from."""

    label: str
    text: str
    chunk_size: int
    chunks: Sequence[Row]
    n_of_text: int  # chunks of the whole text, of which these are some or all

    @property
    def summary(self) -> str:
        """How much of the text is read, such as `8 of 150 chunks of 512 tokens, spread ...`."""
        size = f"chunks of {self.chunk_size:,} tokens"
        if len(self.chunks) == self.n_of_text:
            return f"all {self.n_of_text:,} {size}"
        return f"{len(self.chunks):,} of {self.n_of_text:,} {size}, spread over the text"

    @property
    def sha256(self) -> str:
        """The hash of the text, which may hold more than the chunks."""
        return hashlib.sha256(self.text.encode("utf-8")).hexdigest()

    @property
    def tokens_sha256(self) -> str:
        """The hash of the chunks: it depends on the tokenizer and on their number."""
        digest = hashlib.sha256()
        hash_rows(digest, self.chunks)
        return digest.hexdigest()


@dataclass(frozen=True)
class Texts:
    """The input of both calibration passes of a build."""

    rows: ObservationRows
    chunks: ImatrixChunks
    made_with: Mapping[str, str] = field(default_factory=dict)  # versions of what tokenized it

    def save(self, path: Path) -> None:
        """Write a safetensors file, whole or not at all. Raises OutputError if the disk fails."""
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
            "chunks_of_text": str(self.chunks.n_of_text),
            MADE_WITH: encode(self.made_with),
        }
        write_arrays(path, arrays, metadata)

    @classmethod
    def load(cls, path: Path) -> Texts:
        """Read the file. Raises ArtifactError if `save` did not write it."""
        from safetensors.numpy import load_file

        try:
            read_header(path)  # every number is bounded before anything is read
            metadata = read_metadata(path)
            arrays = load_file(path)
            check_arrays(metadata, arrays)
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
                int(metadata["chunks_of_text"]),
            )
            if chunks.n_of_text < len(chunks.chunks):
                raise ValueError(f"{len(chunks.chunks)} chunks of a text of {chunks.n_of_text}")
            made_with = decode(metadata[MADE_WITH])
        except (CheckpointError, LookupError, ValueError, TypeError, RecursionError) as error:
            raise ArtifactError(
                f"{path}: damaged, not the tokenized text that was saved ({error}); remove it and "
                "run the same command again"
            ) from error
        return cls(rows, chunks, made_with)


def _packed(name: str, rows: Sequence[Row]) -> dict[str, npt.NDArray[Any]]:
    """Rows of any lengths as two arrays: all tokens, and the length of each row."""
    return {
        f"{name}.tokens": np.concatenate(rows).astype(np.int64),
        f"{name}.lengths": np.array([len(row) for row in rows], dtype=np.int64),
    }


def _unpacked(name: str, arrays: Mapping[str, npt.NDArray[Any]]) -> list[Row]:
    """The rows of two arrays. Raises ValueError if the lengths do not fit the tokens."""
    tokens, lengths = arrays[f"{name}.tokens"], arrays[f"{name}.lengths"]
    if lengths.sum() != len(tokens) or (lengths < 1).any():
        raise ValueError(f"{name} have {len(tokens)} tokens, expected {lengths.sum()}")
    return np.split(tokens, np.cumsum(lengths)[:-1])


def hash_rows(digest: hashlib._Hash, rows: Sequence[Row]) -> None:
    """Add rows to a hash: their lengths and their tokens."""
    for row in rows:
        digest.update(len(row).to_bytes(8, "little") + row.tobytes())
