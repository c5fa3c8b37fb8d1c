"""What a sweep saw of every expert, and the file it is kept in.

Sums are float64 and counts int64, so two runs over different rows add up, and every published
criterion is a quotient of them (arXiv 2510.13999).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.checkpoint.safetensors_header import FileTensor, read_header, read_metadata
from reap2gguf.checkpoint.writer import write_arrays
from reap2gguf.errors import ArtifactError, CheckpointError
from reap2gguf.messages import shown

FORMAT_VERSION = "1"
_MAX_EXPERTS = 2**16
Doubles = npt.NDArray[np.float64]
_NAME = re.compile(r"layers\.(0|[1-9][0-9]{0,5})\.\w+")
# of every layer, each of its safetensors type
_PARTS = {
    "count": "I64",
    "reap_sum": "F64",
    "gate_sum": "F64",
    "norm_sum": "F64",
    "norm_max": "F64",
}


@dataclass(frozen=True)
class LayerObservation:
    """Per expert of one layer, over the tokens routed to it; every array is (E,)."""

    count: npt.NDArray[np.int64]
    reap_sum: Doubles  # gate weight times norm of the expert's output
    gate_sum: Doubles
    norm_sum: Doubles
    norm_max: Doubles


@dataclass(frozen=True)
class Observations:
    """All MoE layers of one model, and what was observed."""

    layers: dict[int, LayerObservation]
    model_fingerprint: str
    calibration: str  # the spec, as given
    calibration_sha256: str
    n_rows: int
    n_tokens: int
    n_dropped_rows: int  # rows left out because their values were not finite
    n_mtp_hits: int = 0  # next-next tokens that an MTP block predicted, on a share of the rows
    n_mtp_tokens: int = 0  # of how many

    def save(self, path: Path) -> None:
        """Write the safetensors file, whole or not at all; OutputError if the disk refuses."""
        arrays = named_layers(self.layers)
        metadata = {name: str(getattr(self, name)) for name in _METADATA}
        write_arrays(path, arrays, metadata | {"format_version": FORMAT_VERSION})

    @classmethod
    def load(cls, path: Path) -> Observations:
        """Read and check the file; ArtifactError if it is broken or not of this format."""
        try:
            header, metadata = read_header(path), read_metadata(path)
            version = metadata.get("format_version")
            if version != FORMAT_VERSION:
                raise ArtifactError(
                    f"{path}: format version {shown(version)}, expected {FORMAT_VERSION!r}; is "
                    "this an observations file? `reap2gguf observe` writes one"
                )
            layers = _read_layers(path, header)
        except CheckpointError as error:
            raise ArtifactError(str(error)) from error
        try:
            numbers = {name: _count(name, metadata[name]) for name in _NUMBERS}
            words = {name: metadata[name] for name in _METADATA if name not in _NUMBERS}
        except (KeyError, ValueError) as error:
            raise ArtifactError(f"{path}: its metadata is incomplete ({error})") from error
        return cls(layers=layers, **numbers, **words)  # type: ignore[arg-type]


_METADATA = [field.name for field in fields(Observations) if field.name != "layers"]
_NUMBERS = [name for name in _METADATA if name.startswith("n_")]


def named_layers(layers: Mapping[int, LayerObservation]) -> dict[str, npt.NDArray[Any]]:
    """Every array of every layer, by the name that it has in the file."""
    return {
        f"layers.{layer}.{field.name}": getattr(seen, field.name)
        for layer, seen in sorted(layers.items())
        for field in fields(seen)
    }


def grouped_layers(arrays: Mapping[str, npt.NDArray[Any]]) -> dict[int, LayerObservation]:
    """The layers of arrays by the names of `named_layers`; KeyError or ValueError if any lacks."""
    matches = [_NAME.fullmatch(name) for name in arrays]
    if not all(matches):
        raise ValueError("holds arrays that are no observations")
    return {
        number: LayerObservation(**{p: arrays[f"layers.{number}.{p}"] for p in _PARTS})
        for number in sorted({int(match[1]) for match in matches if match})
    }


def _count(name: str, text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,18}", text):
        raise ValueError(f"{name} is {shown(text)}")
    return int(text)


def _read_layers(path: Path, header: Mapping[str, FileTensor]) -> dict[int, LayerObservation]:
    matches = [_NAME.fullmatch(name) for name in header]
    numbers = sorted({int(match[1]) for match in matches if match})
    if len(header) != len(numbers) * len(_PARTS):
        _refuse_missing(path, header, numbers)
        raise ArtifactError(f"{path}: holds tensors that are no observations")
    with Checkpoint(path.parent, {}, header, (path,)) as stored:
        return {number: _read_layer(path, stored, number) for number in numbers}


def _refuse_missing(path: Path, header: Mapping[str, FileTensor], numbers: list[int]) -> None:
    for name in (f"layers.{number}.{part}" for number in numbers for part in _PARTS):
        if name not in header:
            raise ArtifactError(f"{path}: {name} is missing")


def _read_layer(path: Path, stored: Checkpoint, number: int) -> LayerObservation:
    names = {part: f"layers.{number}.{part}" for part in _PARTS}
    _refuse_missing(path, stored.tensors, [number])
    tensors = [stored.tensors[name] for name in names.values()]
    kinds = [tensor.dtype for tensor in tensors]
    shapes = {tensor.shape for tensor in tensors}
    if kinds != list(_PARTS.values()) or len(shapes) != 1 or len(tensors[0].shape) != 1:
        raise ArtifactError(f"{path}: layer {number} has uneven sizes or values of another type")
    if tensors[0].n_elements > _MAX_EXPERTS:
        count = tensors[0].n_elements
        raise ArtifactError(f"{path}: layer {number} has {count:,} experts; is it broken?")
    found: dict[str, npt.NDArray[Any]] = {p: stored.read(name) for p, name in names.items()}
    if not all(np.isfinite(values).all() and (values >= 0).all() for values in found.values()):
        raise ArtifactError(f"{path}: layer {number} has negative values, or values not finite")
    return LayerObservation(**found)
