"""What a bundle's own files say of its experts: scores, and tokens before and after pruning."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from reap2gguf.artifacts.observations import Observations
from reap2gguf.bundle.layout import IMATRIX_FILE, OBSERVATIONS_FILE
from reap2gguf.bundle.pictures.experts import ExpertUse
from reap2gguf.gguf_files.reader import read_gguf_header
from reap2gguf.pruning.select import CRITERIA

if TYPE_CHECKING:
    from reap2gguf.bundle.manifest import Manifest


def expert_use(manifest: Manifest, folder: Path) -> list[ExpertUse]:
    """Every pruned layer, in order; empty if the GGUF folder has no observations.

    It is empty too if the observations are not those of the manifest. Tokens after pruning are
    those of the importance matrix, where it was computed in the build. Memory: that of the
    observations, and of a GGUF header. Raises ArtifactError if a file is broken.
    """
    pruning = manifest.pruning
    if not manifest.has_observations or pruning.method not in CRITERIA:
        return []
    seen = Observations.load(folder / OBSERVATIONS_FILE)
    after = _tokens_after(manifest, folder)
    found = []
    for layer, kept in sorted(pruning.kept.items()):
        one = seen.layers.get(layer)
        if one is None or (len(one.count), len(kept)) != (pruning.n_experts, pruning.n_kept):
            return []
        scores = CRITERIA[pruning.method](one)
        found.append(ExpertUse(layer, scores, one.count, one.reap_sum, kept, after.get(layer)))
    return found


def _tokens_after(manifest: Manifest, folder: Path) -> dict[int, npt.NDArray[np.int64]]:
    """Tokens of each kept expert, by layer, as the importance matrix counts them."""
    if not manifest.has_imatrix or manifest.calibration.imatrix_file is not None:
        return {}  # a matrix that was given may not count them
    header = read_gguf_header(folder / IMATRIX_FILE)
    found = {}
    for layer in manifest.pruning.kept:
        name = f"blk.{layer}.ffn_down_exps.weight.counts"
        if name in header.tensors:
            counts = header.read(name).reshape(-1).view(np.float32)
            if len(counts) == manifest.pruning.n_kept:
                found[layer] = np.rint(counts).astype(np.int64)
    return found
