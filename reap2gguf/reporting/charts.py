"""Charts as inline SVG: their marks, axes and legends, and rows of dots on one axis.

Nothing is scaled with the page: positions along an axis are percentages and texts keep their size,
so a chart is as readable on a phone as on a desk. Each mark is a group with a `title`: a browser
shows it without the page's script, which reads it for its own tooltip and for the keyboard. Every
chart stands beside a table with the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from reap2gguf.reporting.html import Child, Html, element, together
from reap2gguf.reporting.numbers import coordinate, plain

if TYPE_CHECKING:
    from reap2gguf.reporting.scales import Scale

_ROW = 28  # height of a row of dots
_FAN = 9  # between two dots of a row that have error bars
_BAR = 4  # half the height of the ends of an error bar


@dataclass(frozen=True)
class Dot:
    """A value on the axis; `tip` is shown when one points at it, its first line as a heading."""

    value: float
    error: float | None
    series: str  # the class that colours it
    tip: str


@dataclass(frozen=True)
class DotRow:
    """One row: its name, its dots, and what is written at its end."""

    label: Child
    dots: Sequence[Dot]
    shown: Child = None
    is_joined: bool = False  # a line from dot to dot
    has_stem: bool = False  # a line from zero to the only dot


@dataclass(frozen=True)
class Legend:
    series: str
    title: str


def figure(name: str, title: str, *content: Child, note: Child = None) -> Html:
    """A chart with its caption."""
    caption = element("figcaption", element("strong", title), element("small", note))
    return element("figure", caption, *content, id=name)


def legend(entries: Sequence[Legend]) -> Html:
    keys = [element("li", _key(one.series), one.title) for one in entries]
    return element("ul", keys, class_="legend")


def _key(series: str) -> Html:
    dot = element("circle", cx="6", cy="6", r="5", class_=series)
    return element("svg", dot, width=12, height=12, aria_hidden="true")


def dot_rows(title: str, rows: Sequence[DotRow], scale: Scale, unit: str) -> Html:
    """Rows of dots on one axis; under them the axis with its ticks."""
    ticks = scale.ticks()
    body = [
        element(
            "div",
            element("span", row.label, class_="label"),
            _track(row, scale, ticks),
            element("span", row.shown, class_="shown"),
            class_="row",
        )
        for row in rows
    ]
    axis = element(
        "div",
        element("span", class_="label"),
        x_axis(scale, ticks),
        element("span", unit, class_="shown unit"),
        class_="row axis",
    )
    return chart(title, body, axis)


def chart(title: str, *content: Child) -> Html:
    """What one goes through with the arrow keys; the name is read out."""
    return element("div", *content, class_="chart", role="group", aria_label=title)


def _track(row: DotRow, scale: Scale, ticks: Sequence[float]) -> Html:
    """Dots with error bars are fanned out, so that their bars do not lie over one another."""
    is_fanned = len(row.dots) > 1 and any(dot.error for dot in row.dots)
    height = _ROW + _FAN * (len(row.dots) - 1) if is_fanned else _ROW
    levels = [height / 2] * len(row.dots)
    if is_fanned:
        levels = [_ROW / 2 + _FAN * number for number in range(len(row.dots))]
    grid = [line(scale.at(tick), 0, scale.at(tick), height, "rule") for tick in ticks]
    joined: list[Html] = []
    if row.has_stem:
        joined = [line(0, levels[0], scale.at(row.dots[0].value), levels[0], "stem")]
    elif row.is_joined and len(row.dots) > 1:
        ends = [(scale.at(d.value), y) for d, y in zip(row.dots, levels, strict=True)]
        joined = [line(*one, *other, "joint") for one, other in pairwise(ends)]
    marks = [_dot(dot, scale, y) for dot, y in zip(row.dots, levels, strict=True)]
    return element("svg", grid, joined, marks, class_="track", height=height, role="presentation")


def _dot(dot: Dot, scale: Scale, y: float) -> Html:
    at = scale.at(dot.value)
    bar = None
    if dot.error:
        low, high = scale.at(dot.value - dot.error), scale.at(dot.value + dot.error)
        ends = [line(x, y - _BAR, x, y + _BAR) for x in (low, high)]
        bar = element("g", line(low, y, high, y), ends, class_="error-bar")
    circle = element("circle", cx=f"{coordinate(at)}%", cy=coordinate(y), r="5")
    return mark(dot.tip, bar, circle, series=dot.series)


def mark(tip: str, *shapes: Child, series: str = "") -> Html:
    """Shapes with a tooltip of several lines."""
    title = element("title", _tip(tip))
    return element("g", title, *shapes, class_=f"mark {series}".strip())


def _tip(tip: str) -> Html:
    """Lines stay lines in a `title`."""
    return Html("\n".join(together(line) for line in tip.split("\n")))


def line(x1: float, y1: float, x2: float, y2: float, class_: str | None = None) -> Html:
    return element(
        "line",
        x1=f"{coordinate(x1)}%",
        y1=coordinate(y1),
        x2=f"{coordinate(x2)}%",
        y2=coordinate(y2),
        class_=class_,
    )


def x_axis(scale: Scale, ticks: Sequence[float]) -> Html:
    """Tick marks and numbers under a chart; those at its ends stay inside."""
    found = []
    for number, tick in enumerate(ticks):
        at = scale.at(tick)
        anchor = "start" if at < 2 else "end" if at > 98 else "middle"
        label = element(
            "text",
            tick_text(tick),
            x=f"{coordinate(at)}%",
            y=16,
            text_anchor=anchor,
            class_="every-second" if number % 2 and len(ticks) > 4 else None,
        )
        found.append(together(line(at, 0, at, 4, "rule"), label))
    return element("svg", found, class_="track x-axis", height=20, aria_hidden="true")


def tick_text(value: float) -> str:
    return f"{value:,.6g}" if abs(value) >= 1e-4 or not value else plain(value, 1)


def slots(numbers: Sequence[int], most: int = 12) -> Html:
    """An axis of equal slots, such as layers or experts; some of them have their number."""
    width, step = 100 / len(numbers), _slot_step(len(numbers), most)
    labels = [
        element(
            "text",
            str(number),
            x=f"{coordinate((i + 0.5) * width)}%",
            y=14,
            class_="first" if not i and width < 1 else None,
        )
        for i, number in enumerate(numbers)
        if i % step == 0
    ]
    return element("svg", labels, class_="track x-axis slots", height=20, aria_hidden="true")


def _slot_step(count: int, most: int) -> int:
    return next(
        one
        for one in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 2**10, 2**12, 2**16, 2**20)
        if count / one <= most
    )
