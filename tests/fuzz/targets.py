"""What every reader promises of any bytes: it loads and keeps its word, or refuses in one line."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES

from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.checkpoint.safetensors_header import ITEM_BYTES, read_header
from reap2gguf.errors import ArtifactError, CheckpointError, Reap2ggufError
from reap2gguf.gguf_files.imatrix import ImatrixEntry, load_imatrix
from reap2gguf.gguf_files.reader import read_gguf_header

MAX_MESSAGE = 2000


@dataclass(frozen=True)
class Target:
    """A reader with its checks, the one class of error it may raise, and its seeds' suffix."""

    check: Callable[[Path], None]
    error: type[Reap2ggufError]
    suffix: str


def run(target: Target, path: Path) -> bool:
    """Whether the file was read; AssertionError if it was neither read well nor refused well."""
    try:
        target.check(path)
    except Reap2ggufError as error:
        assert type(error) is target.error, repr(error)
        check_message(str(error), path)
        return False
    return True


def check_message(message: str, path: Path) -> None:
    """One line that a terminal can show, and that names the file."""
    assert str(path) in message
    rest = message.replace(str(path), "")
    assert rest.isprintable(), rest
    assert len(rest) <= MAX_MESSAGE, len(rest)


def check_extents(extents: list[tuple[int, int]], size: int) -> None:
    """Pieces (offset, bytes) lie in the file, in order, and do not overlap."""
    position = 0
    for offset, n_bytes in extents:
        assert n_bytes >= 0
        assert offset >= position
        position = offset + n_bytes
    assert position <= size


def check_safetensors(path: Path) -> None:
    tensors = read_header(path)
    size = path.stat().st_size
    check_extents([(tensor.offset, tensor.n_bytes) for tensor in tensors.values()], size)
    assert sum(tensor.n_bytes for tensor in tensors.values()) <= size - 10
    with Checkpoint(path.parent, {}, tensors, (path,)) as checkpoint:
        for name, tensor in tensors.items():
            assert name == tensor.name
            assert len(tensor.shape) <= 8
            assert tensor.n_bytes == tensor.n_elements * ITEM_BYTES[tensor.dtype]
            values = checkpoint.read(name)
            assert values.shape == tensor.shape
            assert values.nbytes == tensor.n_bytes


def check_gguf(path: Path) -> None:
    header = read_gguf_header(path)
    size = path.stat().st_size
    check_extents([(tensor.offset, tensor.n_bytes) for tensor in header.tensors.values()], size)
    for name, tensor in header.tensors.items():
        assert name == tensor.name
        assert 1 <= len(tensor.shape) <= 4
        block, block_bytes = GGML_QUANT_SIZES[tensor.tensor_type]
        assert tensor.n_bytes * block == math.prod(tensor.shape) * block_bytes > 0
        assert header.read(name).shape == (math.prod(tensor.shape[:-1]), tensor.row_bytes)
    n_items = 0
    for value in header.metadata.values():
        items = value if isinstance(value, list) else [value]
        n_items += len(items)
        assert all(type(item) in (int, float, bool, str) for item in items)
    assert n_items <= size


def check_imatrix(path: Path) -> None:
    imatrix = load_imatrix(path)
    assert imatrix.entries
    assert 0 <= imatrix.n_chunks < 2**31
    assert 0 <= imatrix.chunk_size < 2**31
    assert isinstance(imatrix.dataset, str)
    for name, entry in imatrix.entries.items():
        assert name == entry.name
        _check_entry(entry)
    n_bytes = sum(entry.sums.nbytes for entry in imatrix.entries.values())
    assert n_bytes < path.stat().st_size
    assert imatrix.uncovered().keys() <= imatrix.entries.keys()
    assert imatrix.unseen_experts().keys() <= imatrix.uncovered().keys()


def _check_entry(entry: ImatrixEntry) -> None:
    n_matrices, n_columns = entry.sums.shape
    assert n_columns > 0
    assert entry.sums.dtype == np.float32
    assert np.isfinite(entry.sums).all()
    assert (entry.sums >= 0).all()
    assert entry.counts.shape == (n_matrices,)
    assert entry.counts.dtype == np.int64
    assert ((entry.counts >= 0) & (entry.counts < 2**53)).all()
    with np.errstate(all="raise", under="ignore"):
        importance = entry.importance()
        for matrix in range(n_matrices):
            one = entry.importance_of(matrix, n_columns)
            is_known = entry.sums[matrix].any()  # zeros alone weight nothing
            assert np.array_equal(one, importance[matrix] if is_known else np.ones_like(one))
    assert np.isfinite(importance).all()
    assert (importance >= 0).all()


TARGETS = {
    "safetensors": Target(check_safetensors, CheckpointError, ".safetensors"),
    "gguf": Target(check_gguf, ArtifactError, ".gguf"),
    "imatrix-gguf": Target(check_imatrix, ArtifactError, ".gguf"),
    "imatrix-dat": Target(check_imatrix, ArtifactError, ".dat"),
}
