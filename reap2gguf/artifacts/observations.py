"""What a sweep saw of every expert, and the file it is kept in.

Sums are float64 and counts int64, so two runs over different rows add up, and every published
criterion is a quotient of them (arXiv 2510.13999).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from reap2gguf.checkpoint.safetensors_header import read_header
from reap2gguf.errors import ArtifactError, CheckpointError, OutputError

FORMAT_VERSION = "1"
Doubles = npt.NDArray[np.float64]
_MAX_METADATA_BYTES = 2**20
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
        """Write the safetensors file under a temporary name, then rename it."""
        from safetensors import SafetensorError
        from safetensors.numpy import save_file

        tensors = {
            f"layers.{layer}.{field.name}": getattr(seen, field.name)
            for layer, seen in sorted(self.layers.items())
            for field in fields(seen)
        }
        metadata = {name: str(getattr(self, name)) for name in _METADATA}
        temporary = path.with_name(path.name + ".tmp")
        try:
            save_file(tensors, temporary, metadata | {"format_version": FORMAT_VERSION})
        except SafetensorError as error:
            raise OutputError(f"{path}: cannot be written ({error})") from error
        os.replace(temporary, path)

    @classmethod
    def load(cls, path: Path) -> Observations:
        """Read and check the file; ArtifactError if it is broken or not of this format."""
        try:
            header = read_header(path)
        except CheckpointError as error:
            raise ArtifactError(str(error)) from error
        metadata = _read_metadata(path)
        version = metadata.get("format_version")
        if version != FORMAT_VERSION:
            raise ArtifactError(
                f"{path}: format version {version!r}, expected {FORMAT_VERSION!r}; is this an "
                "observations file? `reap2gguf observe` writes one"
            )
        from safetensors.numpy import load_file

        layers = _group(path, load_file(path), set(header))
        try:
            numbers = {name: int(metadata[name]) for name in _METADATA if name.startswith("n_")}
            words = {name: str(metadata[name]) for name in _METADATA if not name.startswith("n_")}
        except (KeyError, ValueError) as error:
            raise ArtifactError(f"{path}: its metadata is incomplete ({error})") from error
        return cls(layers=layers, **numbers, **words)  # type: ignore[arg-type]


_METADATA = [field.name for field in fields(Observations) if field.name != "layers"]


def _read_metadata(path: Path) -> Mapping[str, Any]:
    """The `__metadata__` of a file whose header has been checked."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        metadata = json.loads(file.read(length)).get("__metadata__") or {}
    words = isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())
    if not words or len(str(metadata)) > _MAX_METADATA_BYTES:
        raise ArtifactError(f"{path}: no readable metadata")
    return metadata


def _group(
    path: Path, arrays: Mapping[str, npt.NDArray[Any]], names: set[str]
) -> dict[int, LayerObservation]:
    parts = [field.name for field in fields(LayerObservation)]
    matches = [_NAME.fullmatch(name) for name in names]
    layers: dict[int, LayerObservation] = {}
    for layer in sorted({int(match[1]) for match in matches if match}):
        try:
            found = {part: arrays[f"layers.{layer}.{part}"] for part in parts}
        except KeyError as error:
            raise ArtifactError(f"{path}: {error.args[0]} is missing") from error
        sizes = {array.shape for array in found.values()}
        if len(sizes) != 1 or not all(np.isfinite(array).all() for array in found.values()):
            raise ArtifactError(f"{path}: layer {layer} has uneven sizes or values not finite")
        layers[layer] = LayerObservation(**found)
    if len(names) != len(layers) * len(parts):
        raise ArtifactError(f"{path}: holds tensors that are no observations")
    return layers
