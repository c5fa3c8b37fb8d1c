"""Works on files of importance matrices: statistics, cutting, adding."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from reap2gguf.options import check_number, check_path

if TYPE_CHECKING:
    from reap2gguf.api.opening import PathLike
    from reap2gguf.gguf_files.activation_statistics import ImatrixStatistics
    from reap2gguf.gguf_files.imatrix import Imatrix


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


def _load(name: str, path: PathLike) -> Imatrix:
    """A matrix in a file that the user named. Raises ArtifactError if it is none."""
    from reap2gguf.gguf_files.imatrix import load_imatrix

    return load_imatrix(Path(os.path.realpath(check_path(name, path))))
