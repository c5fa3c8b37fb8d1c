"""Importance matrices in both of llama.cpp's formats.

An entry holds, per matrix, the sum of squares of what multiplied each column and how many rows
were summed; for experts, one row of sums and one count per expert. GGUF keeps sums and counts
(`NAME.in_sum2`, `NAME.counts`); the legacy `.dat` keeps means times a number of chunks.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFValueType

from reap2gguf.artifacts.gguf_header import read_gguf_header
from reap2gguf.artifacts.gguf_writer import HeaderWriter
from reap2gguf.disk import whole_file
from reap2gguf.errors import ArtifactError

_MAX_ENTRIES = 2**20
_MAX_NAME_BYTES = 2**12
_CHUNK_KEYS = ("imatrix.chunk_count", "imatrix.chunk_size")
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class ImatrixEntry:
    """What multiplied one GGUF matrix: sums of squares (n_matrices, n_columns), rows counted."""

    name: str  # of the GGUF tensor, with .weight
    sums: Floats
    counts: npt.NDArray[np.int64]  # (n_matrices,)

    def importance(self) -> Floats:
        """Mean squares, as llama-quantize takes them: ones where an expert saw no token."""
        counts = self.counts.astype(np.float32)[:, None]
        seen = counts > 0
        return np.where(seen, self.sums / np.where(seen, counts, 1), np.float32(1))

    def importance_of(self, matrix: int, n_columns: int) -> Floats:
        """The (n_columns,) mean squares of one matrix; a .dat has all matrices in one row."""
        row, first = divmod(matrix * n_columns, self.sums.shape[1])
        sums, count = self.sums[row, first : first + n_columns], np.float32(self.counts[row])
        return sums / count if count > 0 else np.ones_like(sums)


@dataclass(frozen=True)
class Imatrix:
    """All entries by GGUF tensor name, and what they were computed from."""

    entries: dict[str, ImatrixEntry]
    dataset: str
    n_chunks: int
    chunk_size: int

    def uncovered(self) -> dict[str, int]:
        """Experts that no token reached, per expert matrix that has any."""
        empty = {name: int((entry.counts == 0).sum()) for name, entry in self.entries.items()}
        return {name: count for name, count in empty.items() if count}


def load_imatrix(path: Path) -> Imatrix:
    """Read either format; ArtifactError if the file is broken or holds NaN or negative sums."""
    try:
        with path.open("rb") as file:
            is_gguf = file.read(4) == b"GGUF"
        imatrix = _load_gguf(path) if is_gguf else _load_dat(path)
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read ({error.strerror or error})") from error
    for entry in imatrix.entries.values():
        if not np.isfinite(entry.sums).all() or (entry.sums < 0).any():
            raise ArtifactError(f"{path}: {entry.name!r} holds NaN, infinite or negative sums")
    return imatrix


def save_gguf(imatrix: Imatrix, path: Path) -> None:
    """Write llama-imatrix's GGUF format, whole or not at all; OutputError if the disk refuses."""
    writer = HeaderWriter("imatrix")
    # an imatrix has a type in place of an architecture
    writer.kv_data[0].clear()
    writer.add_type("imatrix")
    writer.add_key_value(
        "imatrix.datasets", [imatrix.dataset], GGUFValueType.ARRAY, GGUFValueType.STRING
    )
    writer.add_uint32("imatrix.chunk_count", imatrix.n_chunks)
    writer.add_uint32("imatrix.chunk_size", imatrix.chunk_size)
    for name, array in _gguf_tensors(imatrix):
        writer.add_tensor_info(name, array.shape, array.dtype, array.nbytes)
    with whole_file(path) as file:
        file.write(writer.header())
        for _, array in _gguf_tensors(imatrix):
            file.write(array.tobytes() + writer.padding(array.nbytes))


def _gguf_tensors(imatrix: Imatrix) -> Iterator[tuple[str, Floats]]:
    for name, entry in sorted(imatrix.entries.items()):
        yield f"{name}.in_sum2", entry.sums
        yield f"{name}.counts", entry.counts.astype(np.float32)[:, None]


def save_dat(imatrix: Imatrix, path: Path) -> None:
    """Write the legacy layout, for programs that read no other (ik_llama.cpp), as `save_gguf`."""
    with whole_file(path) as file:
        for piece in _dat_pieces(imatrix):
            file.write(piece)


def _dat_pieces(imatrix: Imatrix) -> Iterator[bytes]:
    # an entry without any data cannot be told apart from one of zeros, so it is left out
    entries = [e for _, e in sorted(imatrix.entries.items()) if e.counts.any()]
    yield struct.pack("<i", len(entries))
    for entry in entries:
        name = entry.name.encode()
        # rounded up, so that a matrix seen less than one chunk does not count as unseen
        # a .dat knows no chunk size: its counts are calls already
        calls = -(-int(entry.counts.max()) // max(imatrix.chunk_size, 1))
        values = entry.importance() * np.float32(calls)
        yield struct.pack("<i", len(name)) + name
        yield struct.pack("<ii", calls, values.size) + values.tobytes()
    dataset = imatrix.dataset.encode()
    yield struct.pack("<ii", imatrix.n_chunks, len(dataset)) + dataset


def _load_gguf(path: Path) -> Imatrix:
    header = read_gguf_header(path)
    if header.metadata.get("general.type") != "imatrix":
        raise ArtifactError(f"{path}: a GGUF file, but general.type is not imatrix")
    n_chunks, chunk_size = (header.metadata.get(key, 0) for key in _CHUNK_KEYS)
    datasets = header.metadata.get("imatrix.datasets") or [""]
    if (
        not isinstance(n_chunks, int)
        or not isinstance(chunk_size, int)
        or not isinstance(datasets, list)
    ):
        raise ArtifactError(f"{path}: an imatrix.* key has the wrong type")
    entries: dict[str, ImatrixEntry] = {}
    for tensor in header.tensors:
        name = tensor.removesuffix(".in_sum2")
        if name == tensor:
            continue  # counts are read with their sums; newer files add statistics of no use here
        if f"{name}.counts" not in header.tensors:
            raise ArtifactError(f"{path}: {name!r} has sums but no counts")
        for part in (tensor, f"{name}.counts"):
            kind = header.tensors[part].kind
            if kind is not GGMLQuantizationType.F32:
                raise ArtifactError(f"{path}: {part!r} is {kind.name}, expected F32")
        sums = header.read(tensor).view("<f4")
        counts = header.read(f"{name}.counts").view("<f4").reshape(-1)
        if counts.size == 0 or sums.size % counts.size or not _countable(counts):
            raise ArtifactError(f"{path}: {name!r}: {sums.size} sums do not fit its counts")
        shaped = sums.reshape(counts.size, -1).astype(np.float32)
        entries[name] = ImatrixEntry(name, shaped, counts.astype(np.int64))
    return Imatrix(entries, str(datasets[0]), int(n_chunks), int(chunk_size))


def _countable(counts: Floats) -> bool:
    return bool(np.isfinite(counts).all() and (counts >= 0).all() and (counts < 2**53).all())


def _load_dat(path: Path) -> Imatrix:
    data = path.read_bytes()
    position = 0

    def take(count: int, limit: int, what: str) -> bytes:
        nonlocal position
        if not 0 <= count <= min(limit, len(data) - position):
            raise ArtifactError(
                f"{path}: {what}: {count:,} bytes at byte {position:,} of {len(data):,}; this is "
                "no imatrix or it is truncated"
            )
        position += count
        return data[position - count : position]

    def integer(what: str) -> int:
        return int(struct.unpack("<i", take(4, 4, what))[0])

    n_entries = integer("entry count")
    if not 0 < n_entries <= _MAX_ENTRIES:
        raise ArtifactError(f"{path}: {n_entries} entries; this is no imatrix")
    entries: dict[str, ImatrixEntry] = {}
    for _ in range(n_entries):
        name = take(integer("name length"), _MAX_NAME_BYTES, "name").decode("utf-8", "replace")
        calls, size = integer("calls"), integer("size")
        values = np.frombuffer(take(4 * size, len(data), f"values of {name!r}"), "<f4")
        if calls < 0 or name in entries:
            raise ArtifactError(f"{path}: {name!r} has {calls} calls or occurs twice")
        # one row: the format does not say how many experts the values are of
        entries[name] = ImatrixEntry(name, values[None].copy(), np.array([max(calls, 1)]))
    if position == len(data):  # the oldest files end here
        return Imatrix(entries, "", 0, 0)
    n_chunks = integer("last chunk")
    dataset = take(integer("dataset length"), _MAX_NAME_BYTES, "dataset")
    return Imatrix(entries, dataset.decode("utf-8", "replace"), n_chunks, 0)
