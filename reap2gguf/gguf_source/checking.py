"""Compares a pruned GGUF file with its source: the header's bytes, and every block.

Each expert of each tensor is read from both files and compared byte for byte, one after the other:
not in the runs in which they were copied. Blocks with NaN or infinite values are reported, though
they are the source's: no layer after them computes anything. Memory: two experts of a tensor, or
8 MiB.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from reap2gguf.errors import ArtifactError
from reap2gguf.files import open_plain
from reap2gguf.ggml import load_ggml
from reap2gguf.gguf_files.reader import read_gguf_header
from reap2gguf.messages import shown

if TYPE_CHECKING:
    from pathlib import Path

    from reap2gguf.ggml import Bytes as Raw
    from reap2gguf.ggml import Ggml
    from reap2gguf.gguf_files.reader import GgufHeader
    from reap2gguf.gguf_source.header import PartHead
    from reap2gguf.gguf_source.slices import Slice
    from reap2gguf.progress import Progress, Task

_READ_BYTES = 2**22


def violations_in(
    slices: Mapping[str, Slice],
    files: Iterable[tuple[Path, GgufHeader, PartHead]],
    progress: Progress,
) -> Iterator[str]:
    """What is wrong with files: each with the source's, and the beginning that it must have."""
    ggml = load_ggml()
    total = sum(one.n_bytes for one in slices.values())
    with progress.task("Comparing with the source", total, "bytes") as task:
        for path, source, start in files:
            try:
                yield from _in_file(path, source, start, slices, ggml, task)
            except ArtifactError as error:
                yield str(error)


def _in_file(
    path: Path,
    source: GgufHeader,
    start: PartHead,
    slices: Mapping[str, Slice],
    ggml: Ggml,
    task: Task,
) -> Iterator[str]:
    found = read_gguf_header(path)
    if found.n_bytes != start.n_bytes:
        yield f"{path.name}: has {found.n_bytes:,} bytes, expected {start.n_bytes:,}"
    try:
        with open_plain(path) as file:
            head = file.read(len(start.head))
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read ({error.strerror or error})") from error
    if head != start.head:
        yield f"{path.name}: its header is not the source's with the changes of pruning"
    if list(found.tensors) != list(start.offsets):
        yield f"{path.name}: does not hold the tensors of {source.path.name} in their order"
        return
    for name, info in found.tensors.items():
        one = slices[name]
        is_same = (info.shape, info.tensor_type) == (one.shape, one.info.tensor_type)
        if not is_same:
            yield (
                f"{path.name}: tensor {shown(name)} is {info.tensor_type.name} "
                f"{list(info.shape)}, expected {one.info.tensor_type.name} {list(one.shape)}"
            )
        elif (problem := _problem(found, source, one, ggml)) is not None:
            yield f"{path.name}: tensor {shown(name)}: {problem}"
        task.advance(one.n_bytes)


def _problem(found: GgufHeader, source: GgufHeader, one: Slice, ggml: Ggml) -> str | None:
    """What is wrong with the first expert, or the tensor, of which something is; or None."""
    for entry, ours, theirs in _pairs(found, source, one):
        where = f"its expert {entry}" if one.entries is not None else "it"
        if not np.array_equal(ours, theirs):
            return f"{where} is not the source's, byte for byte"
        if not ggml.is_finite(ours, one.info.tensor_type):
            return (
                f"{where} holds NaN or infinite values, which {source.path} holds too; use an "
                "undamaged copy of that file"
            )
    return None


def _pairs(found: GgufHeader, source: GgufHeader, one: Slice) -> Iterator[tuple[int, Raw, Raw]]:
    """Bytes of a tensor and those that it must have, with the expert (or 0) that they are of."""
    name = one.info.name
    if one.is_flat:
        ours = found.read(name).reshape(one.shape[one.axis], -1)
        theirs = source.read(name).reshape(one.info.shape[one.axis], -1)
        for new, old in enumerate(one.entries or ()):
            yield new, ours[new], theirs[old]
        return
    n_rows = prod(one.info.shape[:-1])
    each = n_rows if one.entries is None else n_rows // one.info.shape[one.axis]
    step = max(1, _READ_BYTES // found.tensors[name].row_bytes)
    for new, old in enumerate((0,) if one.entries is None else one.entries):
        for done in range(0, each, step):
            count = min(step, each - done)
            begins = new * each + done, old * each + done
            yield (
                new,
                found.read(name, begins[0], begins[0] + count),
                source.read(name, begins[1], begins[1] + count),
            )
