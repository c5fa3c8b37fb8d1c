"""Quality against size, as a picture: one point per model, named beside it.

With figures, the height is the KL divergence from the reference, or the perplexity where there is
only one other model to compare it with; without, bits per weight. matplotlib is imported when a
picture is drawn.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from reap2gguf.atomic import write_whole

if TYPE_CHECKING:
    from pathlib import Path

    from reap2gguf.comparing.compared import ModelComparison

_INCHES = (8.0, 5.0)
_DOTS = 160  # per inch
_COLORS = ("#2a6fbb", "#d1592a", "#3a9a5b", "#8a4fb5", "#b58a1d", "#5a6472")
_INK, _GRID, _PAPER = "#1f2630", "#d5dae1", "#ffffff"
_MANY_TIMES = 20  # between the least and the most: then the scale is logarithmic
_LONGEST = 34  # letters of a name
_LINE = 13 * _DOTS / 72  # height of a name, in dots


@dataclass(frozen=True)
class Point:
    """A model in the picture."""

    label: str
    n_bytes: int
    height: float
    error: float = 0.0


def points_of(found: ModelComparison) -> tuple[str, list[Point]]:
    """What the height means, and the models that have one."""
    sizes = {one.label: one.contents.n_file_bytes for one in found.models}
    apart = [
        Point(label, sizes[label], divergence.mean.value, divergence.mean.error)
        for label in sizes
        if (divergence := found.divergence(label)) is not None
    ]
    if len(apart) > 1:
        return f"KL divergence from {_short(found.reference)} (nats)", apart
    measured = [
        Point(label, sizes[label], perplexity.value, perplexity.error)
        for label in sizes
        if (perplexity := found.perplexity(label)) is not None
    ]
    if measured:
        return "perplexity", measured
    return "bits per weight", [
        Point(one.label, sizes[one.label], one.contents.bits_per_weight) for one in found.models
    ]


def write_picture(found: ModelComparison, path: Path) -> None:
    """Write a PNG, whole or not at all. Raises OutputError if the disk fails."""
    write_whole(path, draw(found))


def draw(found: ModelComparison) -> bytes:
    """The picture as a PNG file."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    title, points = points_of(found)
    with matplotlib.rc_context({"font.family": "DejaVu Sans", "font.size": 10}):
        figure = Figure(figsize=_INCHES, dpi=_DOTS, facecolor=_PAPER, layout="constrained")
        canvas = FigureCanvasAgg(figure)
        axes = figure.subplots()
        unit, n_bytes = _unit(points)
        _frame(axes, f"size of the files ({unit})", title, points)
        for number, point in enumerate(points):
            axes.errorbar(
                point.n_bytes / n_bytes,
                point.height,
                yerr=point.error or None,
                fmt="o",
                color=_COLORS[number % len(_COLORS)],
                markersize=8,
                capsize=3,
                zorder=3,
            )
        _name(axes, points, n_bytes)
        raw = io.BytesIO()
        canvas.print_png(raw, metadata={"Software": None})  # type: ignore[no-untyped-call]
    return raw.getvalue()


def _unit(points: Sequence[Point]) -> tuple[str, int]:
    """What the sizes are counted in, and how many bytes that is."""
    most = max(point.n_bytes for point in points)
    return ("GiB", 2**30) if most >= 2**29 else ("MiB", 2**20)


def _frame(axes: Any, width: str, height: str, points: Sequence[Point]) -> None:
    """Axes with their titles, a grid, and room for the names."""
    axes.set_facecolor(_PAPER)
    axes.set_xlabel(width, color=_INK)
    axes.set_ylabel(height, color=_INK)
    heights = [point.height for point in points if point.height > 0]
    if len(heights) == len(points) and max(heights) > _MANY_TIMES * min(heights):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(color=_GRID, linewidth=0.8, zorder=0)
    axes.tick_params(colors=_INK, length=0)
    for name, spine in axes.spines.items():
        spine.set_visible(name in ("left", "bottom"))
        spine.set_color(_GRID)
    axes.margins(0.15, 0.15)


def _name(axes: Any, points: Sequence[Point], n_bytes: int) -> None:
    """Each model's name beside its point, towards the middle; names do not cover each other."""
    axes.autoscale_view()
    low, high = axes.get_xlim()
    taken: list[tuple[bool, float]] = []  # on which side, and how high, in dots
    for number, point in sorted(enumerate(points), key=lambda entry: entry[1].height):
        x = point.n_bytes / n_bytes
        is_left = x < (low + high) / 2
        place = axes.transData.transform((x, point.height))[1]
        free = place
        while any(side == is_left and abs(free - other) < _LINE for side, other in taken):
            free += _LINE / 4
        taken.append((is_left, free))
        axes.annotate(
            _short(point.label),
            (x, point.height),
            xytext=(12 if is_left else -12, (free - place) * 72 / _DOTS),
            textcoords="offset points",
            ha="left" if is_left else "right",
            va="center",
            color=_COLORS[number % len(_COLORS)],
        )


def _short(label: str) -> str:
    """A name that fits; what differs between files of one model is at the end."""
    return label if len(label) <= _LONGEST else f"...{label[-_LONGEST + 3 :]}"
