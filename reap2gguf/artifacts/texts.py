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
NOT_COUNTED = 0  # chunks of a text far longer than needed, of which only parts were tokenized
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
    """Chunks for the importance matrix, in the order of the text they were cut from."""

    label: str
    text: str
    chunk_size: int
    chunks: Sequence[Row]
    n_of_text: int  # chunks of the whole text, of which these are some or all; or NOT_COUNTED

    @property
    def summary(self) -> str:
        """How much of the text is read, such as `8 of 150 chunks of 512 tokens, spread ...`."""
        size = f"chunks of {self.chunk_size:,} tokens"
        if self.n_of_text == NOT_COUNTED:
            return f"{len(self.chunks):,} {size}, spread over a text that is far longer"
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
    """The input of the calibration passes of a build; None for what no pass reads."""

    rows: ObservationRows | None
    chunks: ImatrixChunks | None
    made_with: Mapping[str, str] = field(default_factory=dict)  # versions of what tokenized it
    held: Sequence[Row] = ()  # that no pass reads, to choose a method by; never in a file

    def save(self, path: Path) -> None:
        """Write a safetensors file, whole or not at all. Raises OutputError if the disk fails."""
        arrays: dict[str, npt.NDArray[Any]] = {}
        metadata: dict[str, str] = {MADE_WITH: encode(self.made_with)}
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
            metadata["chunks_of_text"] = str(chunks.n_of_text)
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
            made_with = decode(metadata[MADE_WITH])
        except (CheckpointError, LookupError, ValueError, TypeError, RecursionError) as error:
            raise ArtifactError(
                f"{path}: damaged, not the tokenized text that was saved ({error}); remove it and "
                "run the same command again"
            ) from error
        return cls(rows, chunks, made_with)


def _read_rows(metadata: Mapping[str, str], arrays: _Arrays) -> ObservationRows:
    return ObservationRows(
        metadata["rows_label"],
        metadata["rows_sha256"],
        _unpacked("rows", arrays),
        component_records(json.loads(metadata["components"])),
    )


def _read_chunks(metadata: Mapping[str, str], arrays: _Arrays) -> ImatrixChunks:
    chunks = ImatrixChunks(
        metadata["chunks_label"],
        arrays["text"].tobytes().decode("utf-8"),
        int(metadata["chunk_size"]),
        _unpacked("chunks", arrays),
        int(metadata["chunks_of_text"]),
    )
    if chunks.n_of_text != NOT_COUNTED and chunks.n_of_text < len(chunks.chunks):
        raise ValueError(f"{len(chunks.chunks)} chunks of a text of {chunks.n_of_text}")
    return chunks


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
