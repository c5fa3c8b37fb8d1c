"""Compares a pruned GGUF file with its source: the header's bytes, and every block.

Each expert of each tensor is read from both files and compared byte for byte, one after the other:
not in the runs in which they were copied. Memory: two experts of a tensor, or 8 MiB.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from reap2gguf.errors import ArtifactError
from reap2gguf.files import open_plain
from reap2gguf.gguf_files.reader import read_gguf_header
from reap2gguf.messages import shown

if TYPE_CHECKING:
    from pathlib import Path

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
    total = sum(one.n_bytes for one in slices.values())
    with progress.task("Comparing with the source", total, "bytes") as task:
        for path, source, start in files:
            try:
                yield from _in_file(path, source, start, slices, task)
            except ArtifactError as error:
                yield str(error)


def _in_file(
    path: Path, source: GgufHeader, start: PartHead, slices: Mapping[str, Slice], task: Task
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
        elif (expert := _first_difference(found, source, one)) is not None:
            where = f"its expert {expert}" if one.entries is not None else "it"
            yield f"{path.name}: tensor {shown(name)}: {where} is not the source's, byte for byte"
        task.advance(one.n_bytes)


def _first_difference(found: GgufHeader, source: GgufHeader, one: Slice) -> int | None:
    """The first expert, or 0, whose bytes differ from the source's; None if none does."""
    name = one.info.name
    if one.is_flat:
        ours = found.read(name).reshape(one.shape[one.axis], -1)
        theirs = source.read(name).reshape(one.info.shape[one.axis], -1)
        pairs = enumerate(one.entries or ())
        return next((n for n, old in pairs if not np.array_equal(ours[n], theirs[old])), None)
    n_rows = prod(one.info.shape[:-1])
    if one.entries is None:
        return None if _are_equal(found, source, name, (0, 0), n_rows) else 0
    each = n_rows // one.info.shape[one.axis]
    for new, old in enumerate(one.entries):
        if not _are_equal(found, source, name, (new * each, old * each), each):
            return new
    return None


def _are_equal(
    found: GgufHeader, source: GgufHeader, name: str, begins: tuple[int, int], n_rows: int
) -> bool:
    """Whether `n_rows` rows from each begin on are the same."""
    step = max(1, _READ_BYTES // found.tensors[name].row_bytes)
    for done in range(0, n_rows, step):
        count = min(step, n_rows - done)
        ours, theirs = (
            header.read(name, begin + done, begin + done + count)
            for header, begin in zip((found, source), begins, strict=True)
        )
        if not np.array_equal(ours, theirs):
            return False
    return True
