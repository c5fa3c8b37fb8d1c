"""What a calibration pass observed of every expert, and the file format for it.

Sums are float64 and counts int64: runs over different rows can be added, and every published
criterion is one of them or a quotient of two (arXiv 2510.13999, 2606.15716). Files of format 1,
which earlier versions wrote, have the first five arrays only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from reap2gguf.artifacts.made_with import MADE_WITH, decode, encode
from reap2gguf.artifacts.observed_sums import (
    IMATRIX,
    ObservedSums,
    check_header,
    is_sum,
    packed,
    unpacked,
)
from reap2gguf.checkpoint.safetensors_header import (
    FileTensor,
    StoredTensor,
    read_header,
    read_metadata,
)
from reap2gguf.checkpoint.tensor_files import TensorFiles
from reap2gguf.checkpoint.writer import check_arrays, write_arrays
from reap2gguf.errors import ArtifactError, CheckpointError
from reap2gguf.messages import shown

if TYPE_CHECKING:
    from reap2gguf.checkpoint.weights import Doubles

FORMAT_VERSION = "2"
_MAX_EXPERTS = 2**16
_NAME = re.compile(r"layers\.(0|[1-9][0-9]{0,5})\.\w+")


@dataclass(frozen=True)
class LayerObservation:
    """Per expert of one layer, over the tokens routed to it. Every array is (E,).

    A norm is the L2 norm of the expert's output, before it is weighted by the gate. The arrays of
    the second group are None in observations of format 1.
    """

    count: npt.NDArray[np.int64]
    reap_sum: Doubles  # of gate weight times norm
    gate_sum: Doubles
    norm_sum: Doubles
    norm_max: Doubles
    gate2_sum: Doubles | None = None  # of squared gate weights
    norm2_sum: Doubles | None = None
    gate2_norm_sum: Doubles | None = None
    gate_norm2_sum: Doubles | None = None
    gate2_norm2_sum: Doubles | None = None
    output_max: Doubles | None = None  # the largest magnitude of a value of an output

    @property
    def is_complete(self) -> bool:
        """Whether nothing is missing that observations of the newest format have."""
        return all(getattr(self, name) is not None for name in _PARTS[FORMAT_VERSION])


@dataclass(frozen=True)
class Observations:
    """The observations of all MoE layers of one model, and what they were made on."""

    layers: dict[int, LayerObservation]
    model_fingerprint: str
    calibration: str  # the spec, as given
    calibration_sha256: str
    n_rows: int
    n_tokens: int
    n_dropped_rows: int  # rows skipped because their values were not finite
    n_mtp_hits: int = 0  # next-next tokens that an MTP block predicted right
    n_mtp_tokens: int = 0  # next-next tokens that it was asked for, on some of the rows
    made_with: Mapping[str, str] = field(default_factory=dict)  # versions of what computed it
    imatrix: ObservedSums | None = None  # of all experts, on the same rows, if it was asked for
    architecture: str = ""  # general.architecture; empty in files of earlier versions
    tokens_sha256: str = ""  # of the text of its tokens (`tokenizer/identity.py`); or empty

    def save(self, path: Path) -> None:
        """Write a safetensors file, whole or not at all. Raises OutputError if the disk refuses."""
        sums, said = packed(self.imatrix)
        arrays = named_layers(self.layers) | sums
        is_complete = all(seen.is_complete for seen in self.layers.values())
        version = FORMAT_VERSION if is_complete else _OLD_VERSION
        metadata = {name: str(getattr(self, name)) for name in _METADATA} | said
        metadata |= {name: value for name in _ADDED if (value := getattr(self, name))}
        metadata[MADE_WITH] = encode(self.made_with)
        write_arrays(path, arrays, metadata | {"format_version": version})

    @classmethod
    def load(cls, path: Path) -> Observations:
        """Read and check a file. Raises ArtifactError if it is broken or of another format."""
        try:
            header, metadata = read_header(path), read_metadata(path)
            version = metadata.get("format_version")
            if version not in _PARTS:
                raise ArtifactError(
                    f"{path}: format version {shown(version)}, expected "
                    f"{' or '.join(map(repr, _PARTS))}; is this an observations file? "
                    "`reap2gguf observe` writes one"
                )
            sums = _read_sums(path, header, metadata.get(IMATRIX))
            others = {name: one for name, one in header.items() if name not in sums}
            layers = _read_layers(path, others, _PARTS[version])
        except CheckpointError as error:
            raise ArtifactError(str(error)) from error
        try:
            numbers = {name: _whole_number(name, metadata[name]) for name in _NUMBERS}
            words = {name: metadata[name] for name in _METADATA if name not in _NUMBERS}
            words |= {name: metadata.get(name, "") for name in _ADDED}
            made_with = decode(metadata.get(MADE_WITH, "{}"))
        except (KeyError, ValueError) as error:
            raise ArtifactError(f"{path}: its metadata is incomplete ({error})") from error
        try:
            check_arrays(metadata, named_layers(layers) | sums)
        except ValueError as error:
            raise ArtifactError(
                f"{path}: damaged ({error}); remove it and run the same command again"
            ) from error
        try:
            imatrix = unpacked(metadata.get(IMATRIX), sums)
        except ValueError as error:
            raise ArtifactError(f"{path}: {error}") from error
        said = {**numbers, **words}
        return cls(layers=layers, made_with=made_with, imatrix=imatrix, **said)  # type: ignore[arg-type]


# the arrays of each layer, by format version
_OLD_VERSION = "1"
_PARTS = {
    _OLD_VERSION: tuple(part.name for part in fields(LayerObservation) if part.default is MISSING),
    FORMAT_VERSION: tuple(part.name for part in fields(LayerObservation)),
}
_ADDED = ("architecture", "tokens_sha256")  # which files of earlier versions do not have
_METADATA = [
    entry.name
    for entry in fields(Observations)
    if entry.name not in ("layers", MADE_WITH, IMATRIX, *_ADDED)
]
_NUMBERS = [name for name in _METADATA if name.startswith("n_")]


def named_layers(layers: Mapping[int, LayerObservation]) -> dict[str, npt.NDArray[Any]]:
    """Every array of every layer, by its name in the file; what one layer lacks is left out."""
    is_complete = all(seen.is_complete for seen in layers.values())
    return {
        f"layers.{layer}.{name}": getattr(seen, name)
        for layer, seen in sorted(layers.items())
        for name in _PARTS[FORMAT_VERSION if is_complete else _OLD_VERSION]
    }


def grouped_layers(arrays: Mapping[str, npt.NDArray[Any]]) -> dict[int, LayerObservation]:
    """The reverse of `named_layers`.

    Raises KeyError if an array is missing, ValueError for a name that is not an observation's.
    """
    matches = [_NAME.fullmatch(name) for name in arrays]
    if not all(matches):
        raise ValueError("holds arrays that are not observations")
    return {
        number: LayerObservation(
            **{name: arrays[f"layers.{number}.{name}"] for name in _PARTS[FORMAT_VERSION]}
        )
        for number in sorted({int(match[1]) for match in matches if match})
    }


def _whole_number(name: str, text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,18}", text):
        raise ValueError(f"{name} is {shown(text)}")
    return int(text)


def _read_sums(
    path: Path, header: Mapping[str, FileTensor], said: str | None
) -> dict[str, npt.NDArray[Any]]:
    """The arrays of an importance matrix; none if the file has none."""
    try:
        check_header(header, said)
    except ValueError as error:
        raise ArtifactError(f"{path}: {error}; run `reap2gguf observe` again") from error
    with TensorFiles(path.parent, {}, header, (path,)) as stored:
        return {name: stored.read(name) for name in header if is_sum(name)}


def _read_layers(
    path: Path, header: Mapping[str, FileTensor], parts: Sequence[str]
) -> dict[int, LayerObservation]:
    matches = [_NAME.fullmatch(name) for name in header]
    numbers = sorted({int(match[1]) for match in matches if match})
    if len(header) != len(numbers) * len(parts):
        _refuse_missing(path, header, numbers, parts)
        raise ArtifactError(f"{path}: holds tensors that are not observations")
    with TensorFiles(path.parent, {}, header, (path,)) as stored:
        return {number: _read_layer(path, stored, number, parts) for number in numbers}


def _refuse_missing(
    path: Path, header: Mapping[str, StoredTensor], numbers: list[int], parts: Sequence[str]
) -> None:
    for name in (f"layers.{number}.{part}" for number in numbers for part in parts):
        if name not in header:
            raise ArtifactError(f"{path}: {name} is missing")


def _read_layer(
    path: Path, stored: TensorFiles, number: int, parts: Sequence[str]
) -> LayerObservation:
    names = {part: f"layers.{number}.{part}" for part in parts}
    _refuse_missing(path, stored.tensors, [number], parts)
    tensors = [stored.tensors[name] for name in names.values()]
    dtypes = [tensor.dtype for tensor in tensors]
    shapes = {tensor.shape for tensor in tensors}
    expected = ["I64" if part == "count" else "F64" for part in parts]
    if dtypes != expected or len(shapes) != 1 or len(tensors[0].shape) != 1:
        raise ArtifactError(
            f"{path}: layer {number} has arrays of different sizes or of the wrong type"
        )
    if tensors[0].n_elements > _MAX_EXPERTS:
        count = tensors[0].n_elements
        raise ArtifactError(
            f"{path}: layer {number} has {count:,} experts, expected at most {_MAX_EXPERTS:,}"
        )
    found: dict[str, npt.NDArray[Any]] = {part: stored.read(name) for part, name in names.items()}
    if not all(np.isfinite(values).all() and (values >= 0).all() for values in found.values()):
        raise ArtifactError(f"{path}: layer {number} has negative, NaN or infinite values")
    return LayerObservation(**found)
