"""Checks the importance matrix of a bundle: both files, their entries, and the numbers in them.

Memory: what `load_imatrix` takes, and one entry of the `.dat` file more.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from reap2gguf.bundle.layout import IMATRIX_DAT_FILE, IMATRIX_FILE, MANIFEST_FILE
from reap2gguf.errors import ArtifactError
from reap2gguf.gguf_files.imatrix import Imatrix, dat_bytes, load_imatrix
from reap2gguf.gguf_files.imatrix_coverage import layer_hits
from reap2gguf.gguf_files.reader import read_gguf_header
from reap2gguf.messages import shown
from reap2gguf.models.description import sums_shape
from reap2gguf.verifying.gguf_layout import check_layout

if TYPE_CHECKING:
    from reap2gguf.bundle.manifest import CalibrationRecord, PruningRecord
    from reap2gguf.gguf_files.imatrix import ImatrixEntry
    from reap2gguf.models.contract import MoeModel

_MOST_LOST = 0.02  # of the chunks; a sweep refuses half of that, its other rows counted
Shapes = Mapping[str, tuple[int, ...]]


def open_imatrix(folder: Path) -> tuple[Imatrix | None, list[str]]:
    """The importance matrix of a GGUF folder, and the violations in its file."""
    path = folder / IMATRIX_FILE
    try:
        return load_imatrix(path), list(check_layout(read_gguf_header(path)))
    except ArtifactError as error:
        return None, [str(error)]


def check_dat(folder: Path, imatrix: Imatrix) -> Iterator[str]:
    """`imatrix.dat` must hold the same matrix, byte for byte as it is written."""
    path = folder / IMATRIX_DAT_FILE
    with path.open("rb") as file:
        for part in dat_bytes(imatrix):
            if file.read(len(part)) != part:
                yield f"{path.name}: does not hold the values of {IMATRIX_FILE}"
                return
        if file.read(1):
            yield f"{path.name}: has bytes after its end"


def check_recorded_imatrix(
    imatrix: Imatrix, calibration: CalibrationRecord, pruning: PruningRecord, shapes: Shapes
) -> Iterator[str]:
    """A matrix against the manifest, and against the shapes of the tensors of a GGUF file."""
    yield from _check_numbers(imatrix, calibration)
    mtp_block = max(pruning.kept, default=0) if pruning.mtp.state in ("pruned", "kept") else None
    for name, entry in imatrix.entries.items():
        shape = shapes.get(name)
        if shape is None or len(shape) < 2:
            yield f"{IMATRIX_FILE}: {shown(name)} is not a matrix of the model"
            continue
        expected_shape = sums_shape(name, shape)
        if entry.sums.shape != expected_shape:
            yield (
                f"{IMATRIX_FILE}: {name} has sums of shape {list(entry.sums.shape)}, expected "
                f"{list(expected_shape)}"
            )
        elif calibration.imatrix_file is None:  # a given one may have been made in any way
            # an MTP block sees a token together with the next one
            is_mtp = mtp_block is not None and name.startswith(f"blk.{mtp_block}.")
            per_chunk = imatrix.chunk_size - is_mtp
            yield from _check_counts(entry, imatrix, per_chunk, pruning.experts_per_token)


def _check_numbers(imatrix: Imatrix, calibration: CalibrationRecord) -> Iterator[str]:
    """What the manifest says of all matrices together: the text, and what the experts saw."""
    numbers = {
        "imatrix.chunk_count": (imatrix.n_chunks, calibration.imatrix_chunks),
        "imatrix.chunk_size": (imatrix.chunk_size, calibration.imatrix_chunk_size),
        "imatrix.datasets": (", ".join(imatrix.datasets), calibration.imatrix_text),
    }
    for what, (found, expected) in numbers.items():
        if found != expected:
            yield (
                f"{IMATRIX_FILE}: {what} is {shown(found)}, expected {shown(expected)} as in "
                f"{MANIFEST_FILE}"
            )
    n_unseen = sum(imatrix.unseen_experts().values())
    if n_unseen != calibration.imatrix_unseen:
        yield (
            f"{IMATRIX_FILE}: no token reached {n_unseen} experts, expected "
            f"{calibration.imatrix_unseen} as in {MANIFEST_FILE}"
        )
    covered = calibration.imatrix_coverage
    if covered is not None and covered.tokens != layer_hits(imatrix):
        yield (
            f"{IMATRIX_FILE}: its experts saw other numbers of tokens than imatrix_coverage in "
            f"{MANIFEST_FILE} says"
        )


def _check_counts(
    entry: ImatrixEntry, imatrix: Imatrix, per_chunk: int, experts_per_token: int
) -> Iterator[str]:
    """Every token passes each matrix once, or `experts_per_token` experts of a layer.

    A few chunks may be lost to values that are not finite.
    """
    uses = 1 if len(entry.counts) == 1 else experts_per_token
    total, most = int(entry.counts.sum()), int(entry.counts.max())
    n_chunks, rest = divmod(total, max(per_chunk * uses, 1))
    lost = imatrix.n_chunks - n_chunks
    if rest or not 0 <= lost <= 1 + imatrix.n_chunks * _MOST_LOST or most > n_chunks * per_chunk:
        yield (
            f"{IMATRIX_FILE}: {entry.name} counts {total:,} tokens, and {most:,} for one matrix; "
            f"expected {imatrix.n_chunks * per_chunk * uses:,} by its chunks"
        )


def check_entries(imatrix: Imatrix, model: MoeModel, is_given: bool = False) -> Iterator[str]:
    """A matrix must have an entry for every matrix that the model multiplies, and no other.

    One that was given to the build may have others: `check_recorded_imatrix` compares those with
    the file.
    """
    if is_given:
        return
    expected = model.weighted_matrices()
    for name in sorted(expected - imatrix.entries.keys()):
        yield f"{IMATRIX_FILE}: has no entry for {name}"
    for name in sorted(imatrix.entries.keys() - expected):
        yield f"{IMATRIX_FILE}: has an entry for {shown(name)}, which the model does not multiply"
