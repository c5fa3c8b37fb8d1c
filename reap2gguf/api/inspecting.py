"""Looks into results: observations, importance matrices, and what a bundle has kept."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from reap2gguf.errors import ArtifactError, UsageError
from reap2gguf.options import check_choice, check_path
from reap2gguf.pruning.methods import OBSERVED

if TYPE_CHECKING:
    from reap2gguf.api.opening import PathLike
    from reap2gguf.artifacts.observations import Observations
    from reap2gguf.bundle.manifest import Manifest
    from reap2gguf.gguf_files.imatrix import Imatrix
    from reap2gguf.gguf_files.imatrix_statistics import ImatrixInspection
    from reap2gguf.gguf_source.inspection import GgufInspection
    from reap2gguf.pruning.inspection import BundleInspection, ObservationsInspection

_MOST_RATIOS = 64
_OBSERVATIONS = "observations*.safetensors"  # in a folder of a bundle
_SHARED, _ENDING = "observations", "*.safetensors"  # in the work folder


def inspect(
    what: PathLike | Observations | Imatrix,
    *,
    method: str | None = None,
    ratios: Sequence[float] | None = None,
) -> ObservationsInspection | BundleInspection | ImatrixInspection | GgufInspection:
    """Look into observations, an importance matrix, a bundle, or a GGUF file of a model.

    Nothing is written. Of a GGUF file, what its header says: its experts, its types, and which
    experts of its source it keeps.

    Observations: the share of the scores that each layer keeps if `ratios` of its experts are
    removed, and the tokens per expert. A bundle, by either of its folders: what was kept, with its
    share of the scores if the observations are still in the output folder; with `ratios`, what
    other ratios would keep. `method` is the criterion: by default `reap`, or the bundle's own.
    Raises ArtifactError for a file that is none of these, UsageError for a ratio that is not from 0
    to 1, or ratios of a bundle whose observations are gone.
    """
    from reap2gguf.artifacts.observations import Observations
    from reap2gguf.gguf_files.imatrix import Imatrix, load_imatrix
    from reap2gguf.gguf_files.imatrix_statistics import inspect_imatrix
    from reap2gguf.pruning.inspection import RATIOS, inspect_observations

    if method is not None:
        check_choice("method", method, tuple(OBSERVED))
    chosen = RATIOS if ratios is None else _ratios(ratios)
    if isinstance(what, Imatrix):
        return inspect_imatrix(what)
    if isinstance(what, Observations):
        return inspect_observations(what, method or "reap", chosen)
    path = Path(os.path.realpath(check_path("path", what)))  # the user named it
    if path.is_dir():
        return _of_bundle(path, method, None if ratios is None else chosen)
    if _is_model(path):
        from reap2gguf.gguf_source.inspection import inspect_gguf
        from reap2gguf.models.table import BY_GGUF

        return inspect_gguf(path, BY_GGUF)
    if _is_imatrix(path):
        return inspect_imatrix(load_imatrix(path))
    return inspect_observations(Observations.load(path), method or "reap", chosen)


def _of_bundle(
    folder: Path, method: str | None, ratios: Sequence[float] | None
) -> ObservationsInspection | BundleInspection:
    """What a bundle keeps, or what other ratios would keep."""
    from reap2gguf.pruning.inspection import inspect_bundle, inspect_observations

    manifest = _manifest(folder)
    seen = observations_of(manifest, folder)
    if ratios is None:
        return inspect_bundle(manifest, seen, method)
    if seen is None:
        raise UsageError(
            f"{folder}: the observations are no longer in .work/observations beside the bundle, "
            "so other ratios cannot be shown; leave out --ratios"
        )
    return inspect_observations(seen, method or manifest.pruning.method, ratios)


def _ratios(ratios: Sequence[float]) -> tuple[float, ...]:
    if not 1 <= len(ratios) <= _MOST_RATIOS:
        raise UsageError(f"{len(ratios)} ratios, expected 1 to {_MOST_RATIOS}")
    for ratio in ratios:
        if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 <= ratio < 1:
            raise UsageError(f"ratio {ratio!r}: expected 0 or more and less than 1, such as 0.25")
    return tuple(ratios)


def _manifest(folder: Path) -> Manifest:
    from reap2gguf.bundle.layout import MANIFEST_FILE
    from reap2gguf.bundle.manifest import Manifest
    from reap2gguf.files import is_plain

    if not is_plain(folder / MANIFEST_FILE):
        raise UsageError(
            f"{folder}: not a bundle: it holds no {MANIFEST_FILE}; pass a folder that `build` "
            "made, a file that `observe` wrote, or an importance matrix"
        )
    return Manifest.load(folder)


def observations_of(manifest: Manifest, folder: Path) -> Observations | None:
    """The observations that a bundle was pruned by, if they are in it or still beside it.

    Raises ArtifactError if they cannot be read.
    """
    from reap2gguf.artifacts.observations import Observations
    from reap2gguf.building.workdir import Workdir
    from reap2gguf.bundle.layout import folders_of
    from reap2gguf.bundle.manifest import hash_file
    from reap2gguf.files import is_plain

    if not manifest.pruning.observations_sha256:
        return None
    folders = folders_of(folder, None if manifest.hf is None else manifest.hf.folder)
    places = [folder] if folders is None else [folders.gguf, folders.hf]
    found = [path for place in places for path in sorted(place.glob(_OBSERVATIONS))]
    found += sorted((Workdir(folder.parent, manifest.name).shared / _SHARED).glob(_ENDING))
    try:
        for path in found:
            if is_plain(path) and hash_file(path).sha256 == manifest.pruning.observations_sha256:
                return Observations.load(path)
    except OSError as error:
        raise ArtifactError(f"{folder}: cannot be read ({error.strerror or error})") from error
    return None


def _is_model(path: Path) -> bool:
    """Whether a file is a GGUF file of a model whose architecture is known."""
    from reap2gguf.files import is_gguf
    from reap2gguf.gguf_files.reader import read_gguf_header
    from reap2gguf.models.table import BY_GGUF

    if not path.is_file() or not is_gguf(path):
        return False
    return read_gguf_header(path).metadata.get("general.architecture") in BY_GGUF


def _is_imatrix(path: Path) -> bool:
    """Whether a file is an importance matrix, or another GGUF file, by its first bytes or name."""
    from reap2gguf.files import open_plain

    try:
        with open_plain(path) as file:
            return file.read(4) == b"GGUF" or path.suffix == ".dat"
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read ({error.strerror or error})") from error
