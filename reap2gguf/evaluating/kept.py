"""What an interrupted evaluation has found so far, beside its output.

The scores of the last sweep, and those of each GGUF file that llama.cpp computes after it, are
safetensors; what was measured file by file is one file of JSON. Each has the keys of its inputs;
what has another key, or cannot be read, is measured again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from reap2gguf.atomic import write_whole
from reap2gguf.bundle.evaluation import Evaluation, evaluation_of
from reap2gguf.checkpoint.config import read_json
from reap2gguf.checkpoint.safetensors_header import read_header, read_metadata
from reap2gguf.checkpoint.tensor_files import TensorFiles
from reap2gguf.checkpoint.writer import CHECKSUM, check_arrays, write_arrays
from reap2gguf.errors import CheckpointError
from reap2gguf.evaluating.scores import Pair, ScoredRow, Scores, VariantScores

_MOST_BYTES = 2**26  # of the file of records
_KEY = "key"


def save_scores(path: Path, key: str, scores: Scores) -> None:
    """Write scores, whole or not at all. Raises OutputError if the disk fails."""
    arrays: dict[str, npt.NDArray[np.generic]] = {}
    for number, found in enumerate(scores.variants.values()):
        arrays[f"nll.{number}"], arrays[f"top.{number}"] = found.nll, found.top
    for number, apart in enumerate(scores.divergences.values()):
        arrays[f"apart.{number}"] = apart
    write_arrays(path, arrays, {_KEY: key})


def load_scores(
    path: Path, key: str, rows: Sequence[ScoredRow], names: Sequence[str], pairs: Sequence[Pair]
) -> Scores | None:
    """The scores of these rows, variants and pairs that were written with this key, if any."""
    count = (sum(row.n_scored for row in rows),)
    expected = {f"nll.{number}": ("F64", count) for number in range(len(names))}
    expected |= {f"top.{number}": ("I64", count) for number in range(len(names))}
    expected |= {f"apart.{number}": ("F64", count) for number in range(len(pairs))}
    try:
        if not path.is_file():
            return None
        header, metadata = read_header(path), read_metadata(path)
        found = {name: (tensor.dtype, tensor.shape) for name, tensor in header.items()}
        if metadata.get(_KEY) != key or CHECKSUM not in metadata or found != expected:
            return None
        with TensorFiles(path.parent, {}, header, (path,)) as stored:
            arrays = {name: stored.read(name) for name in header}
        check_arrays(metadata, arrays)
        doubles: Any = arrays
        variants = {
            name: VariantScores(doubles[f"nll.{number}"], doubles[f"top.{number}"])
            for number, name in enumerate(names)
        }
        apart = {pair: doubles[f"apart.{number}"] for number, pair in enumerate(pairs)}
        return Scores(rows, variants, apart)
    except (CheckpointError, ValueError, KeyError):
        return None  # damaged: it is measured again


class KeptScores:
    """Scores of variants that are computed one after the other, each in a file of its own."""

    def __init__(self, path: Path, key: str) -> None:
        """`path`: what the names of the files begin with; `key`: of all that they depend on."""
        self._path, self._key = path, key

    def get(self, name: str, rows: Sequence[ScoredRow], pairs: Sequence[Pair]) -> Scores | None:
        """The scores of a variant, and of the pairs that it is the second of, if they are kept."""
        return load_scores(self._file(name), self._key, rows, [name], pairs)

    def put(self, name: str, scores: Scores) -> None:
        """Keep them. Raises OutputError if the disk fails."""
        save_scores(self._file(name), self._key, scores)

    def _file(self, name: str) -> Path:
        digest = hashlib.sha256(name.encode()).hexdigest()[:16]
        return self._path.with_name(f"{self._path.name}.{digest}")


class KeptRecords:
    """Records of what was measured, each under the key of its inputs, in one file of JSON."""

    def __init__(self, path: Path | None) -> None:
        """Read a file, if it is there and whole; None keeps nothing."""
        self._path = path
        self._found: dict[str, Evaluation] = {}
        if path is None or not path.is_file():
            return
        try:
            self._found = _records(read_json(path, _MOST_BYTES))
        except (CheckpointError, LookupError, TypeError, ValueError):
            self._found = {}  # damaged: all is measured again

    def get(self, key: str) -> Evaluation | None:
        """What was kept under a key."""
        return self._found.get(key)

    def put(self, key: str, found: Evaluation) -> None:
        """Keep a record. Raises OutputError if the disk fails."""
        self._found[key] = found
        if self._path is not None:
            values = {key: one.as_json() for key, one in self._found.items()}
            write_whole(self._path, json.dumps(values))


def _records(values: Mapping[str, Any]) -> dict[str, Evaluation]:
    return {key: evaluation_of(one) for key, one in values.items()}
