"""The sums of an importance matrix inside an observations file.

Matrices that multiply the same input have the same sums, which are stored once: array `imatrix.N`
is that of the N-th list of names in the metadata.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from reap2gguf.checkpoint.safetensors_header import FileTensor

IMATRIX = "imatrix"  # key of the metadata, and what names of arrays begin with
_FIELDS = {"sums": "F32", "counts": "I64"}


@dataclass(frozen=True)
class MatrixSums:
    """Of one GGUF matrix: sums of squares (n, columns) float32, and counts (n,) int64."""

    name: str
    sums: npt.NDArray[np.float32]
    counts: npt.NDArray[np.int64]


@dataclass(frozen=True)
class ObservedSums:
    """The sums of all matrices, by name, and the rows that they were taken on."""

    entries: Mapping[str, MatrixSums]
    n_chunks: int  # rows
    chunk_size: int  # tokens of the longest


def packed(imatrix: ObservedSums | None) -> tuple[dict[str, npt.NDArray[Any]], dict[str, str]]:
    """The arrays and the metadata that hold a matrix; both empty for none."""
    if imatrix is None:
        return {}, {}
    groups = _groups(imatrix)
    arrays = {
        f"{IMATRIX}.{number}.{field}": getattr(group[0], field)
        for number, group in enumerate(groups)
        for field in _FIELDS
    }
    said = {
        "entries": [[entry.name for entry in group] for group in groups],
        "chunks": imatrix.n_chunks,
        "chunk_size": imatrix.chunk_size,
    }
    return arrays, {IMATRIX: json.dumps(said)}


def _groups(imatrix: ObservedSums) -> list[list[MatrixSums]]:
    """Entries of one layer with equal sums together, in the order of the first of each.

    By their values, not by the arrays: after a resumed sweep equal sums are different arrays.
    """
    found: dict[tuple[object, ...], list[MatrixSums]] = {}
    for entry in imatrix.entries.values():
        digest = hashlib.sha256(entry.sums.tobytes()).digest()
        layer = tuple(entry.name.split(".")[:2])
        key = (layer, entry.sums.shape, digest, entry.counts.tobytes())
        found.setdefault(key, []).append(entry)
    return list(found.values())


def is_sum(name: str) -> bool:
    """Whether an array is of the sums."""
    return name.startswith(f"{IMATRIX}.")


def expected_arrays(text: str | None) -> dict[str, str]:
    """Names and types of the arrays that the metadata promises. Raises ValueError if it is wrong.

    `text` is what the metadata says under IMATRIX; None if it says nothing.
    """
    return {
        f"{IMATRIX}.{number}.{field}": dtype
        for number in range(len(_names(text)))
        for field, dtype in _FIELDS.items()
    }


def check_header(header: Mapping[str, FileTensor], text: str | None) -> None:
    """Raises ValueError unless exactly the promised arrays are there, with shapes that fit."""
    expected = expected_arrays(text)
    found = {name: tensor.dtype for name, tensor in header.items() if is_sum(name)}
    if found != expected:
        wrong = sorted(set(found.items()) ^ set(expected.items()))[0][0]
        raise ValueError(f"{wrong} is missing, of another type, or not in its list of matrices")
    for number in range(len(expected) // len(_FIELDS)):
        sums, counts = (header[f"{IMATRIX}.{number}.{field}"].shape for field in _FIELDS)
        if len(sums) != 2 or counts != sums[:1]:
            raise ValueError(f"{IMATRIX}.{number} has sums {sums} and counts {counts}")


def unpacked(text: str | None, arrays: Mapping[str, npt.NDArray[Any]]) -> ObservedSums | None:
    """The matrix that `packed` made arrays and metadata of. Raises ValueError if it is broken."""
    if text is None:
        return None
    entries: dict[str, MatrixSums] = {}
    for number, names in enumerate(_names(text)):
        sums, counts = (arrays[f"{IMATRIX}.{number}.{field}"] for field in _FIELDS)
        if not np.isfinite(sums).all() or (sums < 0).any() or (counts < 0).any():
            raise ValueError(f"{IMATRIX}.{number} has negative, NaN or infinite values")
        entries |= {name: MatrixSums(name, sums, counts) for name in names}
    said = json.loads(text)
    return ObservedSums(entries, said["chunks"], said["chunk_size"])


def _names(text: str | None) -> list[list[str]]:
    """The lists of matrices that share sums. Raises ValueError for anything else."""
    if text is None:
        return []
    try:
        said = json.loads(text)
    except (ValueError, RecursionError):
        said = None
    if not isinstance(said, dict) or set(said) != {"entries", "chunks", "chunk_size"}:
        raise ValueError(f"{IMATRIX} is no list of matrices with chunks and their size")
    for key in ("chunks", "chunk_size"):
        if type(said[key]) is not int or not 0 <= said[key] < 2**31:
            raise ValueError(f"{key} of {IMATRIX} is no number from 0 to 2^31")
    groups = said["entries"]
    if not isinstance(groups, list) or not all(isinstance(group, list) for group in groups):
        raise ValueError(f"entries of {IMATRIX} are no lists")
    names = [name for group in groups for name in group]
    if not all(isinstance(name, str) for name in names) or len(names) != len(set(names)):
        raise ValueError(f"entries of {IMATRIX} are not names, or occur twice")
    if not all(groups):
        raise ValueError(f"entries of {IMATRIX} have an empty list")
    return groups
