"""Adds observations of one model that were made on different texts.

Sums, counts and largest values of disjoint texts add up: the result is what one pass over all of
them would have found, but for the order of float64 additions. Memory: the observations, and the
sum.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np

from reap2gguf.artifacts.observations import LayerObservation, Observations
from reap2gguf.artifacts.observed_sums import MatrixSums, ObservedSums
from reap2gguf.errors import ArtifactError, UsageError
from reap2gguf.messages import shown

_MOST_COUNTS = 2**53  # tokens of an expert; float64 sums beside more would not be exact
_MOST_LABEL = 1000  # letters
_MOST_VERSIONS = 100  # letters of the versions of one library


def merge_observed(given: Sequence[tuple[str, Observations]]) -> Observations:
    """The sum of observations, each with the name of its file.

    What one of them lacks, because it is of an earlier format or without sums of an importance
    matrix, the sum lacks too. Raises ArtifactError if they are not of the same model, layers and
    experts, or count more than a file can hold; UsageError for fewer than two, and for two that
    were made on the same rows.
    """
    if len(given) < 2:
        raise UsageError("one file of observations, expected two or more to merge")
    _check_same(given)
    seen = [one for _, one in given]
    layers = {layer: _added([one.layers[layer] for one in seen]) for layer in seen[0].layers}
    for layer, one in layers.items():
        if one.count.max(initial=0) > _MOST_COUNTS or not _is_finite(one):
            raise ArtifactError(
                f"layer {layer}: the merged sums are larger than a file of observations can hold"
            )
    return Observations(
        layers=layers,
        model_fingerprint=seen[0].model_fingerprint,
        calibration=_label(one.calibration for one in seen),
        calibration_sha256=_joined_hash(one.calibration_sha256 for one in seen),
        n_rows=sum(one.n_rows for one in seen),
        n_tokens=sum(one.n_tokens for one in seen),
        n_dropped_rows=sum(one.n_dropped_rows for one in seen),
        n_mtp_hits=sum(one.n_mtp_hits for one in seen),
        n_mtp_tokens=sum(one.n_mtp_tokens for one in seen),
        made_with=_versions([one.made_with for one in seen]),
        imatrix=_added_sums(given),
        architecture=_said_by_all([one.architecture for one in seen]),
        tokens_sha256=_said_by_all([one.tokens_sha256 for one in seen]),
    )


def _check_same(given: Sequence[tuple[str, Observations]]) -> None:
    first_file, first = given[0]
    files: dict[str, str] = {}
    for file, one in given:
        if one.model_fingerprint != first.model_fingerprint:
            raise ArtifactError(
                f"{file}: is of another checkpoint (fingerprint "
                f"{shown(one.model_fingerprint[:12])}) than {first_file} "
                f"({shown(first.model_fingerprint[:12])}); observations of one model can be merged"
            )
        if one.layers.keys() != first.layers.keys():
            raise ArtifactError(
                f"{file}: has layers {shown(sorted(one.layers))}, and {first_file} has "
                f"{shown(sorted(first.layers))}; were they observed with another --mtp?"
            )
        for layer, seen in one.layers.items():
            if seen.count.shape != first.layers[layer].count.shape:
                raise ArtifactError(
                    f"{file}: layer {layer} has {len(seen.count)} experts, and {first_file} has "
                    f"{len(first.layers[layer].count)}"
                )
        if (before := files.setdefault(one.calibration_sha256, file)) is not file:
            raise UsageError(
                f"{file}: was observed on the same rows as {before}, which would count twice; pass "
                "observations on different texts"
            )


def _added(layers: Sequence[LayerObservation]) -> LayerObservation:
    """Sums and counts added, the largest of the largest values; None where one has none."""
    found: dict[str, Any] = {}
    for part in fields(LayerObservation):
        arrays = [getattr(one, part.name) for one in layers]
        if any(array is None for array in arrays):
            found[part.name] = None
        elif part.name.endswith("_max"):
            found[part.name] = np.maximum.reduce(arrays)
        else:
            with np.errstate(over="ignore"):  # what overflows is refused
                found[part.name] = np.add.reduce(arrays)
    return LayerObservation(**found)


def _added_sums(given: Sequence[tuple[str, Observations]]) -> ObservedSums | None:
    """The sums of an importance matrix, where all of the files have them; else None.

    Raises ArtifactError for matrices of different names or shapes, and for sums beyond float32.
    """
    parts = [(file, one.imatrix) for file, one in given if one.imatrix is not None]
    if len(parts) < len(given):
        return None
    (first_file, first), *others = parts
    entries = {}
    for name, entry in first.entries.items():
        sums, counts = entry.sums.astype(np.float64), entry.counts.copy()
        for file, other in others:
            found = other.entries.get(name)
            is_same = found is not None and found.sums.shape == sums.shape
            if found is None or not is_same or other.entries.keys() != first.entries.keys():
                raise ArtifactError(
                    f"{file}: has other sums of the importance matrix than {first_file}, such as "
                    f"of {shown(name)}; observe both with the same version and options"
                )
            sums += found.sums
            counts += found.counts
        if sums.max(initial=0) > np.finfo(np.float32).max:
            raise ArtifactError(
                f"{name}: the merged sums of the importance matrix overflow float32"
            )
        entries[name] = MatrixSums(name, sums.astype(np.float32), counts)
    n_chunks = sum(one.n_chunks for _, one in parts)
    return ObservedSums(entries, n_chunks, max(one.chunk_size for _, one in parts))


def _is_finite(layer: LayerObservation) -> bool:
    arrays = [getattr(layer, part.name) for part in fields(layer)]
    return all(np.isfinite(array).all() for array in arrays if array is not None)


def _said_by_all(values: Sequence[str]) -> str:
    """What all say; empty if they do not say the same."""
    return values[0] if len(set(values)) == 1 else ""


def _label(calibrations: Iterable[str]) -> str:
    label = " + ".join(calibrations)
    return label if len(label) <= _MOST_LABEL else f"{label[: _MOST_LABEL - 3]}..."


def _joined_hash(hashes: Iterable[str]) -> str:
    """A hash of hashes, in the order in which they are given."""
    return hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def _versions(made_with: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """The version of each library; several are joined, such as "2.12, 2.13"."""
    names = dict.fromkeys(name for versions in made_with for name in versions)
    found = {}
    for name in names:
        used = dict.fromkeys(versions[name] for versions in made_with if name in versions)
        found[name] = ", ".join(used)[:_MOST_VERSIONS]
    return found
