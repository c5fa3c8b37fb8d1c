"""Works on files of importance matrices: statistics, cutting, adding."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from reap2gguf.bundle.layout import MANIFEST_FILE
from reap2gguf.errors import UsageError
from reap2gguf.files import is_plain
from reap2gguf.gguf_files.part_names import parse_part_name
from reap2gguf.machine import processes
from reap2gguf.options import check_number, check_path
from reap2gguf.outputs import claimed, keep_inputs, output_file

if TYPE_CHECKING:
    from reap2gguf.api.opening import PathLike
    from reap2gguf.building.slicing import SlicedImatrix
    from reap2gguf.gguf_files.activation_statistics import ImatrixStatistics
    from reap2gguf.gguf_files.imatrix import Imatrix
    from reap2gguf.gguf_files.imatrix_merge import MergedImatrix


def imatrix_statistics(what: PathLike | Imatrix, *, below: int = 100) -> ImatrixStatistics:
    """The figures of `llama-imatrix --show-statistics`, and the tokens of every expert.

    `what` is a matrix, or a `.gguf` or `.dat` file of one. Experts with fewer than `below` tokens
    are counted. Raises ArtifactError for a file that is no importance matrix.
    """
    from reap2gguf.gguf_files import activation_statistics
    from reap2gguf.gguf_files.imatrix import Imatrix

    check_number("below", below, 1)
    imatrix = what if isinstance(what, Imatrix) else _load("imatrix", what)
    return activation_statistics.imatrix_statistics(imatrix, below)


def slice_imatrix(
    what: PathLike | Imatrix,
    kept: PathLike,
    output: PathLike | None = None,
    *,
    overwrite: bool = False,
) -> SlicedImatrix:
    """Cut a matrix of the unpruned model to the experts that a pruned model keeps.

    `what` is a matrix, or a `.gguf` or `.dat` file of one; `kept` is either folder of a bundle, or
    the folder or GGUF file that `prune` wrote. Names and shapes are then those of the pruned model.
    With `output`, a `.gguf` file, both formats are written. Raises ArtifactError for a matrix of
    another model, UsageError for what has no record of kept experts, and OutputError, also if a
    file exists and is not to be overwritten.
    """
    from reap2gguf.building.pruned_models import read_pruned
    from reap2gguf.building.slicing import slice_to
    from reap2gguf.gguf_files.imatrix import Imatrix

    folder = Path(os.path.realpath(check_path("kept", kept)))
    inputs = [] if isinstance(what, Imatrix) else [check_path("imatrix", what)]
    read = [*inputs, *_parts_of(folder)] if folder.is_file() else inputs
    with claimed(written := _outputs(output, read, folder), overwrite):
        imatrix = what if isinstance(what, Imatrix) else _load("imatrix", what)
        sliced = slice_to(imatrix, read_pruned(folder), str(inputs[0]) if inputs else "imatrix")
        _save(sliced.imatrix, written)
    return sliced


def merge_imatrices(
    what: Sequence[PathLike | Imatrix],
    output: PathLike | None = None,
    *,
    overwrite: bool = False,
) -> MergedImatrix:
    """Add matrices of one model that were computed on different texts.

    Each is a matrix, or a `.gguf` or `.dat` file of one. With `output`, a `.gguf` file, both
    formats are written. Raises ArtifactError for matrices of different models, UsageError for fewer
    than two, and OutputError, also if a file exists and is not to be overwritten.
    """
    from reap2gguf.gguf_files.imatrix import Imatrix
    from reap2gguf.gguf_files.imatrix_merge import merge

    if isinstance(what, str | Path | Imatrix) or len(what) < 2:
        raise UsageError("one importance matrix, expected two or more to merge")
    paths = {at: check_path("imatrix", x) for at, x in enumerate(what) if not _is_matrix(x)}
    files = list(paths.values())
    if twice := [path for path in files if files.count(path) > 1]:
        raise UsageError(f"{twice[0]}: is given twice, and its text would count twice")
    with claimed(written := _outputs(output, files, None), overwrite):
        given = []
        for at, one in enumerate(what):
            where = str(paths.get(at, f"imatrix {at + 1}"))
            given.append((where, one if isinstance(one, Imatrix) else _load("imatrix", one)))
        merged = merge(given)
        _save(merged.imatrix, written)
    return merged


def _is_matrix(one: object) -> bool:
    from reap2gguf.gguf_files.imatrix import Imatrix

    return isinstance(one, Imatrix)


def dat_beside(path: Path) -> Path:
    """The file of the older format, beside that of a matrix; of a run, the first process checks it.

    Raises UsageError if `path` is that file itself, OutputError if it cannot be written.
    """
    if path.suffix == ".dat":
        raise UsageError(f"{path}: name the .gguf file; the .dat is written beside it")
    dat = path.with_suffix(".dat")
    return output_file(dat) if processes().is_first else dat


def _outputs(output: PathLike | None, inputs: list[Path], folder: Path | None) -> list[Path]:
    """Both files to write, or none. What would replace an input, or spoil a bundle, is refused."""
    if output is None:
        return []
    path = output_file(output)
    both = [path, dat_beside(path)]
    if is_plain(path.parent / MANIFEST_FILE):
        raise UsageError(
            f"{path}: {path.parent} is a bundle, and its files are those that were built; write to "
            "another folder"
        )
    keep_inputs(both, inputs, path if folder is None else folder)
    return both


def _parts_of(file: Path) -> list[Path]:
    """A GGUF file, with the other parts if it is one of several."""
    part = parse_part_name(file.name)
    if part is None:
        return [file]
    return sorted(file.parent.glob(f"{glob.escape(part.stem)}-*-of-*.gguf"))


def _save(imatrix: Imatrix, both: Sequence[Path]) -> None:
    from reap2gguf.gguf_files.imatrix import save_both

    if both:
        save_both(imatrix, both[0])


def _load(name: str, path: PathLike) -> Imatrix:
    """A matrix in a file that the user named. Raises ArtifactError if it is none."""
    from reap2gguf.gguf_files.imatrix import load_imatrix

    return load_imatrix(Path(os.path.realpath(check_path(name, path))))
