"""Draws the pictures of a bundle from its manifest and the files in its GGUF folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from reap2gguf.bundle.layout import (
    BITS_PICTURE,
    QUALITY_PICTURE,
    SALIENCY_PICTURE,
    USAGE_PICTURE,
)
from reap2gguf.bundle.pictures.canvas import own_settings
from reap2gguf.bundle.pictures.experts import saliency_picture, usage_picture
from reap2gguf.bundle.pictures.files import (
    FilePoint,
    FileTypes,
    bits_picture,
    quality_picture,
)
from reap2gguf.bundle.wording import wording
from reap2gguf.gguf_files.reader import read_gguf_header
from reap2gguf.pruning.methods import NO_METHOD
from reap2gguf.pruning.usage import expert_use

if TYPE_CHECKING:
    from reap2gguf.bundle.evaluation import Estimate, Evaluation
    from reap2gguf.bundle.manifest import Manifest


def draw_pictures(manifest: Manifest, folder: Path) -> dict[str, bytes]:
    """PNG files by name; `folder` holds the bundle's GGUF files.

    Those of the experts need observations, and that of quality an evaluation. The same inputs make
    the same bytes. Memory: some 100 MB of matplotlib's. Raises ArtifactError for a broken file.
    """
    uses = expert_use(manifest, folder)
    header = read_gguf_header(folder / manifest.gguf[0].first)
    shapes = {name: info.shape for name, info in header.tensors.items()}
    types = [FileTypes(one.label, one.bits_per_weight, one.tensors) for one in manifest.gguf]
    points = file_points(manifest)
    found = {}
    with own_settings():
        if uses:
            found[SALIENCY_PICTURE] = saliency_picture(uses, manifest.pruning.method)
            found[USAGE_PICTURE] = usage_picture(uses)
        if points:
            assert manifest.evaluation is not None
            is_whole = manifest.pruning.method == NO_METHOD
            words = None if is_whole else wording(manifest.pruning)
            found[QUALITY_PICTURE] = quality_picture(points, _pruning(manifest.evaluation), words)
        found[BITS_PICTURE] = bits_picture(types, shapes)
    return found


def file_points(manifest: Manifest) -> list[FilePoint]:
    """The files whose divergence from the source was measured."""
    evaluation = manifest.evaluation
    if evaluation is None:
        return []
    found = []
    for record in manifest.gguf:
        source = evaluation.divergence(record.file, "source")
        pruned = evaluation.divergence(record.file, "pruned")
        if source is not None:
            quantizing = None if pruned is None else pruned.mean
            found.append(FilePoint(record.label, record.n_bytes, quantizing, source.mean))
    return found


def _pruning(evaluation: Evaluation) -> Estimate | None:
    found = evaluation.divergence("pruned", "source")
    return None if found is None else found.mean
