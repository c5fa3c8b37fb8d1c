"""Observations as files: several of one model become one."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from reap2gguf.errors import UsageError
from reap2gguf.files import is_plain
from reap2gguf.options import check_path
from reap2gguf.outputs import claimed, keep_inputs, output_file

if TYPE_CHECKING:
    from reap2gguf.api.opening import PathLike
    from reap2gguf.artifacts.observations import Observations


def merge_observations(
    what: Sequence[PathLike | Observations],
    output: PathLike | None = None,
    *,
    overwrite: bool = False,
) -> Observations:
    """Add observations of one model that were made on different texts.

    Each is what `observe` returns, or a file that it wrote. With `output`, the sum is written: as
    if the model had been observed on all of the texts. Raises ArtifactError for observations of
    different models, UsageError for fewer than two or for the same rows twice, and OutputError,
    also if the output exists and is not to be overwritten.
    """
    from reap2gguf.artifacts.observations import Observations
    from reap2gguf.artifacts.observations_merge import merge_observed
    from reap2gguf.bundle.layout import MANIFEST_FILE

    if isinstance(what, str | Path | Observations) or len(what) < 2:
        raise UsageError("one file of observations, expected two or more to merge")
    paths = {
        at: Path(os.path.realpath(check_path("observations", one)))  # the user named it
        for at, one in enumerate(what)
        if not isinstance(one, Observations)
    }
    written = None
    if output is not None:
        written = output_file(output)
        if is_plain(written.parent / MANIFEST_FILE):
            raise UsageError(
                f"{written}: {written.parent} is a bundle, and its files are those that were "
                "built; write to another folder"
            )
        keep_inputs([written], list(paths.values()), written)
    with claimed([written], overwrite):
        given = [
            (f"observations {at + 1}", one)
            if isinstance(one, Observations)
            else (str(one), Observations.load(paths[at]))
            for at, one in enumerate(what)
        ]
        merged = merge_observed(given)
        if written is not None:
            merged.save(written)
    return merged
