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

from reap2gguf.checkpoint.safetensors_header import read_header, read_metadata
from reap2gguf.checkpoint.writer import write_arrays
from reap2gguf.errors import ArtifactError, CheckpointError

FORMAT_VERSION = "1"
Doubles = npt.NDArray[np.float64]
_NAME = re.compile(r"layers\.(\d{1,6})\.\w+")


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
            read_header(path)  # every number is bounded before anything is read
            metadata = read_metadata(path)
        except CheckpointError as error:
            raise ArtifactError(str(error)) from error
        version = metadata.get("format_version")
        if version != FORMAT_VERSION:
            raise ArtifactError(
                f"{path}: format version {version!r}, expected {FORMAT_VERSION!r}; is this an "
                "observations file? `reap2gguf observe` writes one"
            )
        from safetensors.numpy import load_file

        try:
            layers = grouped_layers(load_file(path))
        except ValueError as error:
            raise ArtifactError(f"{path}: {error}") from error
        try:
            numbers = {name: int(metadata[name]) for name in _METADATA if name.startswith("n_")}
            words = {name: str(metadata[name]) for name in _METADATA if not name.startswith("n_")}
        except (KeyError, ValueError) as error:
            raise ArtifactError(f"{path}: its metadata is incomplete ({error})") from error
        return cls(layers=layers, **numbers, **words)  # type: ignore[arg-type]


_METADATA = [field.name for field in fields(Observations) if field.name != "layers"]


def named_layers(layers: Mapping[int, LayerObservation]) -> dict[str, npt.NDArray[Any]]:
    """Every array of every layer, by the name that it has in the file."""
    return {
        f"layers.{layer}.{field.name}": getattr(seen, field.name)
        for layer, seen in sorted(layers.items())
        for field in fields(seen)
    }


def grouped_layers(arrays: Mapping[str, npt.NDArray[Any]]) -> dict[int, LayerObservation]:
    """The layers of named arrays; ValueError if any is missing, foreign or not finite."""
    parts = [field.name for field in fields(LayerObservation)]
    matches = [_NAME.fullmatch(name) for name in arrays]
    layers: dict[int, LayerObservation] = {}
    for layer in sorted({int(match[1]) for match in matches if match}):
        try:
            found = {part: arrays[f"layers.{layer}.{part}"] for part in parts}
        except KeyError as error:
            raise ValueError(f"{error.args[0]} is missing") from error
        sizes = {array.shape for array in found.values()}
        if len(sizes) != 1 or not all(np.isfinite(array).all() for array in found.values()):
            raise ValueError(f"layer {layer} has uneven sizes or values not finite")
        layers[layer] = LayerObservation(**found)
    if len(arrays) != len(layers) * len(parts):
        raise ValueError("holds tensors that are no observations")
    return layers
