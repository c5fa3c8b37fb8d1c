"""A figure against the size of files: one point per file, with its name and its standard error."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from reap2gguf.bundle.pictures.canvas import FAINT, INK, LINES, PAPER, RED, WIDTH, Canvas, Place

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.transforms import Bbox

    from reap2gguf.bundle.evaluation import Estimate

_LOWEST = 1e-6  # on a logarithmic axis; a mean divergence in nats below this is rounding
_LEFT = 0.85  # inches
_LETTER, _LINE = 11.5, 18  # pixels, for the widths of most names
_EDGE = 18  # pixels between a name and the edge of the card
_MARK = 8  # pixels from the middle of a point to what does not touch it
_MOST_STEPS = 14  # lines that a name moves up


@dataclass(frozen=True)
class SizePoint:
    """A file: its name, as short as it is to be written, and what was measured of it."""

    name: str
    n_bytes: int
    height: Estimate


@dataclass(frozen=True)
class Series:
    """Points of one colour; with `is_joined`, a line joins them in the order of their sizes."""

    title: str  # in the legend; "" for none
    colour: str
    points: Sequence[SizePoint]
    marker: str = "o"
    is_joined: bool = True


@dataclass(frozen=True)
class Level:
    """A height to compare the points with, drawn across the picture."""

    title: str
    height: Estimate


def sizes_picture(
    title: str,
    subtitle: Sequence[str],
    heights: str,
    series: Sequence[Series],
    level: Level | None = None,
    is_log: bool = True,
) -> bytes:
    """A PNG file; the points of the first series are named.

    `heights` is the title of the vertical axis, which is logarithmic or linear.
    """
    canvas = Canvas(4.6, title, subtitle)
    axes = canvas.axes(Place(_LEFT, 1.1, 8.75, 2.9))
    if is_log:
        axes.set_yscale("log")
    drawn = [point for one in series for point in one.points]
    is_large = max(point.n_bytes for point in drawn) >= 2**29
    unit, n_bytes = ("GiB", 2**30) if is_large else ("MiB", 2**20)
    axes.set_xlabel(f"size of the file, {unit}", color=FAINT, size=9)
    axes.set_ylabel(heights, color=FAINT, size=9)
    if level is not None:
        _draw_level(axes, level, is_log)
    for one in series:
        _draw_series(axes, one, n_bytes, is_log)
    reached = [point.height for point in drawn]
    _set_widths(axes, [point.n_bytes / n_bytes for point in drawn])
    _set_heights(axes, [*reached, level.height] if level else reached, is_log)
    _name_points(axes, series, n_bytes, is_log)
    axes.grid(color=LINES, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.tick_params(which="minor", length=0, labelleft=False)
    if level is not None or any(one.title for one in series):
        _legend(axes)
    return canvas.png()


def _legend(axes: Axes) -> None:
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(-0.01, 1.02),
        ncols=3,
        frameon=False,
        fontsize=9,
        labelcolor=INK,
        columnspacing=1.6,
        handlelength=1.8,
        borderpad=0,
    )


def _draw_level(axes: Axes, level: Level, is_log: bool) -> None:
    height, error = _drawable(level.height.value, is_log), level.height.error
    lower = max(height - error, _LOWEST / 2) if is_log else height - error
    axes.axhline(height, color=RED, linewidth=1.6, linestyle=(0, (5, 3)), label=level.title)
    axes.axhspan(lower, height + error, color=RED, alpha=0.1, linewidth=0)


def _drawable(height: float, is_log: bool) -> float:
    return max(height, _LOWEST) if is_log else height


def _draw_series(axes: Axes, series: Series, unit: int, is_log: bool) -> None:
    points = sorted(series.points, key=lambda point: point.n_bytes)
    if not points:
        return
    heights = [_drawable(point.height.value, is_log) for point in points]
    errors = [point.height.error for point in points]
    # no bar reaches 0, which has no place on a logarithmic axis
    below = [
        min(error, 0.9 * height) if is_log else error
        for error, height in zip(errors, heights, strict=True)
    ]
    axes.errorbar(
        [point.n_bytes / unit for point in points],
        heights,
        yerr=(below, errors),
        color=series.colour,
        marker=series.marker,
        markersize=6.5,
        markeredgecolor=PAPER,
        markeredgewidth=1,
        linestyle="-" if series.is_joined else "none",
        linewidth=1.4,
        elinewidth=1.2,
        capsize=2.5,
        label=series.title or None,
        zorder=3,
    )


def _set_widths(axes: Axes, sizes: Sequence[float]) -> None:
    """Room on both sides of all points."""
    margin = max(0.08 * (max(sizes) - min(sizes)), 0.05 * max(sizes))
    axes.set_xlim(min(sizes) - margin, max(sizes) + margin)


def _set_heights(axes: Axes, heights: Sequence[Estimate], is_log: bool) -> None:
    """Room around all points, more of it above, where names are; of decades at least one."""
    if is_log:
        values = [_drawable(one.value, is_log) for one in heights]
        low, high = min(values), max(values)
        middle = math.sqrt(low * high)
        axes.set_ylim(min(low / 2, middle / 3), max(high * 2.6, middle * 4))
        return
    low = min(one.value - one.error for one in heights)
    high = max(one.value + one.error for one in heights)
    span = max(high - low, 0.02 * abs(high), _LOWEST)
    axes.set_ylim(low - 0.15 * span, high + 0.4 * span)


def _name_points(axes: Axes, series: Sequence[Series], unit: int, is_log: bool) -> None:
    """Names above the points of the first series, each as low as it can be.

    A name touches neither another one nor a point or its bar, and stays right of the axis.
    """
    from matplotlib.transforms import Bbox

    taken = [_mark(axes, point, unit, is_log) for one in series for point in one.points]
    dpi = axes.figure.dpi
    for point in sorted(series[0].points, key=lambda one: one.n_bytes):
        top = _drawable(point.height.value + point.height.error, is_log)
        x, y = axes.transData.transform((point.n_bytes / unit, top))
        width = _LETTER * len(point.name) + 8
        left = max(_LEFT * dpi, min(x - width / 2, WIDTH * dpi - _EDGE - width))
        for step in range(_MOST_STEPS):
            bottom = y + 12 + (_LINE + 1) * step
            box = Bbox.from_extents(left, bottom, left + width, bottom + _LINE)
            if not any(box.overlaps(other) for other in taken):
                break
        taken.append(box)
        middle, low = axes.transData.inverted().transform((left + width / 2, bottom))
        if step:
            size = point.n_bytes / unit
            axes.plot([size, size], [top, low], color=FAINT, linewidth=0.6, alpha=0.6)
        axes.text(middle, low, point.name, ha="center", va="bottom", size=9, color=INK)


def _mark(axes: Axes, point: SizePoint, unit: int, is_log: bool) -> Bbox:
    """The place of a point with its bar, in pixels."""
    from matplotlib.transforms import Bbox

    height, error, size = point.height.value, point.height.error, point.n_bytes / unit
    ends = (_drawable(height - error, is_log), _drawable(height + error, is_log))
    (x, low), (_, high) = (axes.transData.transform((size, end)) for end in ends)
    return Bbox.from_extents(x - _MARK, low - _MARK, x + _MARK, high + _MARK)
