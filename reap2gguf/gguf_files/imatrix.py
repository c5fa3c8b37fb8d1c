"""Importance matrices, in both of llama.cpp's formats.

For each matrix, an entry holds the sum of squares of the inputs to each column, and the number of
input rows summed. An entry for experts holds one row of sums and one count per expert. GGUF files
keep sums and counts (`NAME.in_sum2`, `NAME.counts`); the legacy `.dat` format keeps means times a
number of chunks.

Both are untrusted. Memory for reading one: below 2.5 times the bytes of its values, plus 1 KiB per
entry, of which there are at most 2^16, plus what the header of a GGUF file takes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFValueType

from reap2gguf.atomic import whole_file
from reap2gguf.errors import ArtifactError
from reap2gguf.files import open_plain
from reap2gguf.gguf_files.reader import Cursor, GgufHeader, read_gguf_header
from reap2gguf.gguf_files.writer import HeaderWriter
from reap2gguf.messages import shown

if TYPE_CHECKING:
    from reap2gguf.checkpoint.weights import Floats

_MAX_ENTRIES = 2**16
_MAX_NAME_BYTES = 2**12
_MAX_SUMS = 2**25  # per entry: 512 experts with 65,536 columns each
_MAX_CHUNKS = 2**31 - 1  # the largest number that both formats can hold
_OF_EXPERTS = ".ffn_down_exps.weight"
_CHUNK_KEYS = ("imatrix.chunk_count", "imatrix.chunk_size")


@dataclass(frozen=True)
class ImatrixEntry:
    """Sums of squares of the inputs to one GGUF tensor, and the input rows they were taken over."""

    name: str  # of the GGUF tensor, with .weight
    sums: Floats  # (n_matrices, n_columns)
    counts: npt.NDArray[np.int64]  # (n_matrices,)

    def importance(self) -> Floats:
        """Mean squares as llama-quantize uses them: ones for an expert that saw no token."""
        counts = self.counts.astype(np.float32)[:, None]
        seen = counts > 0
        return np.where(seen, self.sums / np.where(seen, counts, 1), np.float32(1))

    def importance_of(self, matrix: int, n_columns: int) -> Floats:
        """Mean squares (n_columns,) of one matrix; a .dat file has all matrices in one row.

        Ones where no input was different from zero: by an importance of zeros alone, some types
        would lose the whole matrix.
        """
        row, first = divmod(matrix * n_columns, self.sums.shape[1])
        sums, count = self.sums[row, first : first + n_columns], np.float32(self.counts[row])
        return sums / count if count > 0 and sums.any() else np.ones_like(sums)


@dataclass(frozen=True)
class Imatrix:
    """All entries by GGUF tensor name, and the text they were computed on.

    While a matrix is being computed, its entries are `growing.GrowingEntries`: one that is read
    before it is final is waited for.
    """

    entries: Mapping[str, ImatrixEntry]
    dataset: str
    n_chunks: int
    chunk_size: int
    more_datasets: tuple[str, ...] = ()  # of a matrix that is the sum of several

    @property
    def datasets(self) -> tuple[str, ...]:
        """All texts; none that are not named."""
        return tuple(text for text in (self.dataset, *self.more_datasets) if text)

    def expert_entries(self) -> Iterator[ImatrixEntry]:
        """One entry per layer of experts: all matrices of an expert see the same tokens.

        None for a `.dat` file, which does not say how often each expert was used.
        """
        found = (one for name, one in self.entries.items() if name.endswith(_OF_EXPERTS))
        return (one for one in found if len(one.counts) > 1)

    def unseen_experts(self) -> dict[str, int]:
        """How many experts saw no token, by the matrix that stands for their layer."""
        empty = {one.name: int((one.counts == 0).sum()) for one in self.expert_entries()}
        return {name: count for name, count in empty.items() if count}

    def uncovered(self) -> dict[str, int]:
        """How many experts saw no token, by tensor; only tensors with such experts."""
        empty = {name: int((entry.counts == 0).sum()) for name, entry in self.entries.items()}
        return {name: count for name, count in empty.items() if count}


def load_imatrix(path: Path) -> Imatrix:
    """Read either format.

    Raises ArtifactError if the file is broken or empty, or holds NaN, infinite or negative sums.
    """
    try:
        with open_plain(path) as file:
            is_gguf = file.read(4) == b"GGUF"
            file.seek(0)
            imatrix = _load_gguf(path) if is_gguf else _load_dat(Cursor(path, file))
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read ({error.strerror or error})") from error
    if not imatrix.entries:
        raise ArtifactError(f"{path}: an imatrix without entries")
    for entry in imatrix.entries.values():
        if not np.isfinite(entry.sums).all() or (entry.sums < 0).any():
            name = shown(entry.name)
            raise ArtifactError(f"{path}: {name} holds NaN, infinite or negative sums")
    return imatrix


def save_both(imatrix: Imatrix, gguf_path: Path) -> None:
    """Write both formats, the `.dat` beside the GGUF; OutputError if the disk refuses."""
    save_gguf(imatrix, gguf_path)
    save_dat(imatrix, gguf_path.with_suffix(".dat"))


def save_gguf(imatrix: Imatrix, path: Path) -> None:
    """Write llama-imatrix's GGUF format, whole or not at all; OutputError if the disk refuses."""
    writer = HeaderWriter("imatrix")
    # an imatrix has a type instead of an architecture
    writer.kv_data[0].clear()
    writer.add_type("imatrix")
    datasets = [imatrix.dataset, *imatrix.more_datasets]
    writer.add_key_value("imatrix.datasets", datasets, GGUFValueType.ARRAY, GGUFValueType.STRING)
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
    """Write the legacy format, which ik_llama.cpp needs, whole or not at all, as `save_gguf`."""
    with whole_file(path) as file:
        for chunk in dat_bytes(imatrix):
            file.write(chunk)


def dat_bytes(imatrix: Imatrix) -> Iterator[bytes]:
    """The bytes of the legacy format, entry after entry."""
    # the format cannot tell an entry without data from one of zeros, so it is left out
    entries = [e for _, e in sorted(imatrix.entries.items()) if e.counts.any()]
    yield struct.pack("<i", len(entries))
    for entry in entries:
        name = entry.name.encode()
        # rounded up, so that a matrix with less than one chunk does not count as unseen;
        # an imatrix from a .dat file has chunk size 0, and its counts are calls already
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
    n_chunks, chunk_size = (
        _chunk_number(path, key, header.metadata.get(key, 0)) for key in _CHUNK_KEYS
    )
    datasets = header.metadata.get("imatrix.datasets") or [""]
    if not isinstance(datasets, list) or not all(isinstance(text, str) for text in datasets):
        raise ArtifactError(f"{path}: imatrix.datasets is {shown(datasets)}, expected texts")
    entries: dict[str, ImatrixEntry] = {}
    for tensor in header.tensors:
        name = tensor.removesuffix(".in_sum2")
        if name == tensor:
            continue  # counts are read with their sums; statistics of newer files are not needed
        if len(entries) == _MAX_ENTRIES:
            raise ArtifactError(f"{path}: over {_MAX_ENTRIES:,} entries; this is not an imatrix")
        entries[name] = _gguf_entry(header, name)
    return Imatrix(entries, datasets[0], n_chunks, chunk_size, tuple(datasets[1:]))


def _gguf_entry(header: GgufHeader, name: str) -> ImatrixEntry:
    """One entry: its sums, and a count for each row of them."""
    where = f"{header.path}: {shown(name)}"
    parts = (f"{name}.in_sum2", f"{name}.counts")
    if parts[1] not in header.tensors:
        raise ArtifactError(f"{where} has sums but no counts")
    for part in parts:
        tensor_type = header.tensors[part].tensor_type
        if tensor_type is not GGMLQuantizationType.F32:
            raise ArtifactError(f"{header.path}: {shown(part)} is {tensor_type.name}, expected F32")
    n_sums = header.tensors[parts[0]].n_bytes // 4
    if n_sums > _MAX_SUMS:
        raise ArtifactError(f"{where} has {n_sums:,} sums, expected at most {_MAX_SUMS:,}")
    sums, counts = (header.read(part).view("<f4") for part in parts)
    counts = counts.reshape(-1)
    if len(counts) != len(sums):
        raise ArtifactError(f"{where}: {len(sums)} rows of sums and {len(counts)} counts")
    if not _are_counts(counts):
        raise ArtifactError(f"{where}: its counts are not whole numbers from 0 to 2^53")
    return ImatrixEntry(name, sums.astype(np.float32, copy=False), counts.astype(np.int64))


def _chunk_number(path: Path, what: str, value: object) -> int:
    if type(value) is not int or not 0 <= value <= _MAX_CHUNKS:
        raise ArtifactError(f"{path}: {what} is {shown(value)}, expected 0 to {_MAX_CHUNKS:,}")
    return value


def _are_counts(counts: Floats) -> bool:
    # comparisons are false for NaN
    return bool(((counts >= 0) & (counts < 2**53) & (counts == np.trunc(counts))).all())


def _load_dat(cursor: Cursor) -> Imatrix:
    n_entries = cursor.number("<i", "the entry count")
    if not 0 < n_entries <= _MAX_ENTRIES:
        raise ArtifactError(f"{cursor.path}: {n_entries} entries; this is not an imatrix")
    entries: dict[str, ImatrixEntry] = {}
    for _ in range(n_entries):
        entry = _dat_entry(cursor)
        if entry.name in entries:
            raise ArtifactError(f"{cursor.path}: {shown(entry.name)} occurs twice")
        entries[entry.name] = entry
    if cursor.left == 0:  # the oldest files end here
        return Imatrix(entries, "", 0, 0)
    n_chunks = _chunk_number(cursor.path, "the last chunk", cursor.number("<i", "the last chunk"))
    dataset = _dat_text(cursor, "the dataset's name")
    if cursor.left:
        raise ArtifactError(f"{cursor.path}: {cursor.left:,} bytes after its end")
    return Imatrix(entries, dataset, n_chunks, 0)


def _dat_entry(cursor: Cursor) -> ImatrixEntry:
    name = _dat_text(cursor, "an entry's name")
    calls, size = cursor.number("<i", "a call count"), cursor.number("<i", "a size")
    if calls < 0 or not 0 < size <= _MAX_SUMS:
        raise ArtifactError(
            f"{cursor.path}: {shown(name)} has {calls} calls and {size} values; this is not an "
            "imatrix"
        )
    values = np.frombuffer(cursor.take(4 * size, f"values of {shown(name)}"), "<f4")
    # one row: the format does not say how many experts the values belong to
    return ImatrixEntry(name, values[None].copy(), np.array([max(calls, 1)]))


def _dat_text(cursor: Cursor, what: str) -> str:
    length = cursor.number("<i", what)
    if not 0 <= length <= _MAX_NAME_BYTES:
        raise ArtifactError(
            f"{cursor.path}: {what} has {length:,} bytes, expected at most {_MAX_NAME_BYTES:,}; "
            "this is not an imatrix"
        )
    return cursor.take(length, what).decode("utf-8", "replace")
