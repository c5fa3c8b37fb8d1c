"""Quality against size, as a picture: one point per model, with its name.

With figures, the height is the KL divergence from the reference, or the perplexity where there is
only one other model to compare it with; without, bits per weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from reap2gguf.atomic import write_whole
from reap2gguf.bundle.evaluation import Estimate
from reap2gguf.bundle.pictures.canvas import BLUE, own_settings
from reap2gguf.bundle.pictures.sizes import Series, SizePoint, sizes_picture

if TYPE_CHECKING:
    from pathlib import Path

    from reap2gguf.comparing.compared import ModelComparison

_MANY_TIMES = 20  # between the least and the most: then the scale is logarithmic
_LONGEST = 34  # letters of a name


def points_of(found: ModelComparison) -> tuple[str, list[SizePoint]]:
    """What the height means, and the models that have one."""
    sizes = {one.label: one.contents.n_file_bytes for one in found.models}
    apart = [
        SizePoint(_short(label), sizes[label], divergence.mean)
        for label in sizes
        if (divergence := found.divergence(label)) is not None
    ]
    if len(apart) > 1:
        return f"KL divergence from {_short(found.reference)}", apart
    measured = [
        SizePoint(_short(label), sizes[label], perplexity)
        for label in sizes
        if (perplexity := found.perplexity(label)) is not None
    ]
    if measured:
        return "perplexity", measured
    return "bits per weight", [
        SizePoint(_short(one.label), sizes[one.label], Estimate(one.contents.bits_per_weight, 0))
        for one in found.models
    ]


def write_picture(found: ModelComparison, path: Path) -> None:
    """Write a PNG, whole or not at all. Raises OutputError if the disk fails."""
    write_whole(path, draw(found))


def draw(found: ModelComparison) -> bytes:
    """The picture as a PNG file."""
    heights, points = points_of(found)
    text = None if found.evaluation is None else found.evaluation.text
    lines = ["From headers alone: nothing was measured."]
    if text is not None:
        measured = f"Measured on {text.label}, {text.n_scored:,} tokens, with standard errors"
        lines = [f"{measured}; lower is better."]
    series = [Series("", BLUE, points, is_joined=False)]
    title = f"{heights[0].upper()}{heights[1:]} against size"
    unit = ", nats" if heights.startswith("KL") else ""
    with own_settings():
        return sizes_picture(title, lines, heights + unit, series, is_log=_spans_decades(points))


def _spans_decades(points: Sequence[SizePoint]) -> bool:
    heights = [point.height.value for point in points]
    return min(heights) > 0 and max(heights) > _MANY_TIMES * min(heights)


def _short(label: str) -> str:
    """A name that fits, as the font can show it; what tells files apart is at the end."""
    text = label.removesuffix(".gguf").encode("ascii", "replace").decode()
    return text if len(text) <= _LONGEST else f"...{text[-_LONGEST + 3 :]}"
