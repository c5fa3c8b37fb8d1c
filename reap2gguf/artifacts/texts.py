"""All text that a build reads, as token ids: rows for the observation, chunks for the imatrix."""

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
from reap2gguf.checkpoint.safetensors_header import read_header, read_metadata
from reap2gguf.checkpoint.writer import check_arrays, write_arrays
from reap2gguf.errors import ArtifactError, CheckpointError

Row = npt.NDArray[np.int64]  # token ids, shape (n,)
_Arrays = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class ObservationRows:
    """Rows for the observation, and what they were drawn from."""

    label: str  # SPEC, with paths cut to their last part, since cards are public
    sha256: str  # of the texts and the rows
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
    """The input of the calibration passes of a build; None for what no pass reads."""

    rows: ObservationRows | None
    chunks: ImatrixChunks | None

    def save(self, path: Path) -> None:
        """Write a safetensors file, whole or not at all. Raises OutputError if the disk fails."""
        arrays: dict[str, npt.NDArray[Any]] = {}
        metadata: dict[str, str] = {}
        if (rows := self.rows) is not None:
            arrays |= _packed("rows", rows.rows)
            metadata["rows_label"] = rows.label
            metadata["rows_sha256"] = rows.sha256
            metadata["components"] = json.dumps([asdict(record) for record in rows.components])
        if (chunks := self.chunks) is not None:
            arrays |= _packed("chunks", chunks.chunks)
            arrays["text"] = np.frombuffer(chunks.text.encode("utf-8"), dtype=np.uint8)
            metadata["chunks_label"] = chunks.label
            metadata["chunk_size"] = str(chunks.chunk_size)
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
            rows = _read_rows(metadata, arrays) if "rows_label" in metadata else None
            chunks = _read_chunks(metadata, arrays) if "chunks_label" in metadata else None
        except (CheckpointError, LookupError, ValueError, TypeError, RecursionError) as error:
            raise ArtifactError(
                f"{path}: damaged, not the tokenized text that was saved ({error}); remove it and "
                "run the same command again"
            ) from error
        return cls(rows, chunks)


def _read_rows(metadata: Mapping[str, str], arrays: _Arrays) -> ObservationRows:
    return ObservationRows(
        metadata["rows_label"],
        metadata["rows_sha256"],
        _unpacked("rows", arrays),
        component_records(json.loads(metadata["components"])),
    )


def _read_chunks(metadata: Mapping[str, str], arrays: _Arrays) -> ImatrixChunks:
    return ImatrixChunks(
        metadata["chunks_label"],
        arrays["text"].tobytes().decode("utf-8"),
        int(metadata["chunk_size"]),
        _unpacked("chunks", arrays),
    )


def _packed(name: str, rows: Sequence[Row]) -> dict[str, npt.NDArray[Any]]:
    """Rows of any lengths as two arrays: all tokens, and the length of each row."""
    return {
        f"{name}.tokens": np.concatenate(rows).astype(np.int64),
        f"{name}.lengths": np.array([len(row) for row in rows], dtype=np.int64),
    }


def _unpacked(name: str, arrays: _Arrays) -> list[Row]:
    """The rows of two arrays. Raises ValueError if the lengths do not fit the tokens."""
    tokens, lengths = arrays[f"{name}.tokens"], arrays[f"{name}.lengths"]
    if lengths.sum() != len(tokens) or (lengths < 1).any():
        raise ValueError(f"{name} have {len(tokens)} tokens, expected {lengths.sum()}")
    return np.split(tokens, np.cumsum(lengths)[:-1])


def hash_rows(digest: hashlib._Hash, rows: Sequence[Row]) -> None:
    """Add rows to a hash: their lengths and their tokens."""
    for row in rows:
        digest.update(len(row).to_bytes(8, "little") + row.tobytes())
