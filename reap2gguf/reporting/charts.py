"""Charts as inline SVG: rows of dots on one axis, points, and columns by layer.

Nothing is scaled with the page: positions along an axis are percentages and texts keep their size,
so a chart is as readable on a phone as on a desk. Each mark is a group with a `title`: a browser
shows it without the page's script, which reads it for its own tooltip and for the keyboard. Every
chart stands beside a table with the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from reap2gguf.reporting.html import Child, Html, element, together
from reap2gguf.reporting.numbers import coordinate, plain

_ROW = 28  # height of a row of dots
_MOST_TICKS = 6
_BAR = 4  # half the height of the ends of an error bar


@dataclass(frozen=True)
class Scale:
    """From values to percentages of an axis; values beyond its ends are drawn at the ends."""

    low: float
    high: float
    is_log: bool = False

    def at(self, value: float) -> float:
        if self.is_log:
            value = math.log(max(value, self.low))
            low, high = math.log(self.low), math.log(self.high)
        else:
            low, high = self.low, self.high
        return min(max((value - low) / (high - low), 0.0), 1.0) * 100

    def ticks(self) -> list[float]:
        if not self.is_log:
            step = _nice((self.high - self.low) / _MOST_TICKS)
            first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
            return [number * step for number in range(first, last + 1)]
        first, last = round(math.log10(self.low) - 0.5), math.ceil(math.log10(self.high))
        factors = (1, 2, 5) if last - first <= 2 else (1,)
        found = [f * 10.0**power for power in range(first, last + 1) for f in factors]
        inside = [one for one in found if self.low * 0.999 <= one <= self.high * 1.001]
        return inside[:: -(-len(inside) // (2 * _MOST_TICKS))] if inside else [self.low]


def _nice(step: float) -> float:
    """The next larger of 1, 2 and 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return next((f * power for f in (1, 2, 5) if f * power >= step * 0.999), 10 * power)


def log_scale(values: Sequence[float]) -> Scale:
    """From the power of ten below the smallest positive value to the one above the largest."""
    positive = [value for value in values if value > 0] or [1.0]
    low = 10.0 ** math.floor(math.log10(min(positive)))
    high = 10.0 ** math.ceil(math.log10(max(positive)))
    return Scale(low, high if high > low else 10 * low, is_log=True)


def linear_scale(values: Sequence[float], from_zero: bool = False) -> Scale:
    """Round numbers around all values."""
    low, high = min(values), max(values)
    if from_zero:
        low = min(low, 0.0)
    if not high > low:
        low, high = (low - 0.5, high + 0.5) if low else (0.0, 1.0)
    step = _nice((high - low) / _MOST_TICKS)
    return Scale(math.floor(low / step) * step, math.ceil(high / step) * step)


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
    is_joined: bool = False  # a line from the smallest to the largest dot


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
    middle = _ROW // 2
    grid = [_line(scale.at(tick), 0, scale.at(tick), _ROW, "rule") for tick in ticks]
    joined = None
    if row.is_joined and len(row.dots) > 1:
        places = [scale.at(dot.value) for dot in row.dots]
        joined = _line(min(places), middle, max(places), middle, "joint")
    marks = [_dot(dot, scale, middle) for dot in row.dots]
    return element("svg", grid, joined, marks, class_="track", height=_ROW, role="presentation")


def _dot(dot: Dot, scale: Scale, y: float) -> Html:
    at = scale.at(dot.value)
    bar = None
    if dot.error:
        low, high = scale.at(dot.value - dot.error), scale.at(dot.value + dot.error)
        ends = [_line(x, y - _BAR, x, y + _BAR) for x in (low, high)]
        bar = element("g", _line(low, y, high, y), ends, class_="error-bar")
    circle = element("circle", cx=f"{coordinate(at)}%", cy=coordinate(y), r="5")
    return mark(dot.tip, bar, circle, series=dot.series)


def mark(tip: str, *shapes: Child, series: str = "") -> Html:
    """Shapes with a tooltip of several lines."""
    title = element("title", _tip(tip))
    return element("g", title, *shapes, class_=f"mark {series}".strip())


def _tip(tip: str) -> Html:
    """Lines stay lines in a `title`."""
    return Html("\n".join(together(line) for line in tip.split("\n")))


def _line(x1: float, y1: float, x2: float, y2: float, class_: str | None = None) -> Html:
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
    for tick in ticks:
        at = scale.at(tick)
        anchor = "start" if at < 2 else "end" if at > 98 else "middle"
        label = element("text", _tick(tick), x=f"{coordinate(at)}%", y=16, text_anchor=anchor)
        found.append(together(_line(at, 0, at, 4, "rule"), label))
    return element("svg", found, class_="track x-axis", height=20, aria_hidden="true")


def _tick(value: float) -> str:
    return f"{value:,.6g}" if abs(value) >= 1e-4 or not value else plain(value, 1)


@dataclass(frozen=True)
class Point:
    """A point of a chart with two axes."""

    x: float
    y: float
    error: float | None
    series: str
    label: str  # written beside it where there is room
    tip: str


def points(title: str, found: Sequence[Point], x: Scale, y: Scale, axes: tuple[str, str]) -> Html:
    """Points with error bars; the vertical axis grows upward."""
    height = 300
    down = _downward(y, height)
    grid = _y_grid(y, down)
    vertical = [_line(x.at(tick), 0, x.at(tick), height, "rule faint") for tick in x.ticks()]
    marks = []
    taken: list[tuple[float, float]] = []
    for one in found:
        at, level = x.at(one.x), down(one.y)
        shapes: list[Child] = []
        if one.error:
            ends = [down(one.y - one.error), down(one.y + one.error)]
            shapes.append(element("g", _line(at, ends[0], at, ends[1]), class_="error-bar"))
        shapes.append(element("circle", cx=f"{coordinate(at)}%", cy=coordinate(level), r="5.5"))
        # some 30 % of the width of a phone: a label that would lie over another is left to the tip
        if all(abs(at - left) > 30 or abs(level - top) > 16 for left, top in taken):
            taken.append((at, level))
            is_left = at > 70
            shapes.append(
                element(
                    "text",
                    one.label,
                    x=f"{coordinate(at)}%",
                    y=coordinate(level),
                    dx=-10 if is_left else 10,
                    dy="0.35em",
                    text_anchor="end" if is_left else "start",
                )
            )
        marks.append(mark(one.tip, shapes, series=one.series))
    plot = element("svg", vertical, grid, marks, class_="plot", height=height, role="presentation")
    return chart(
        title, _axis_title(axes[1]), element("div", plot, class_="framed"), _below(x, axes)
    )


def _below(x: Scale, axes: tuple[str, str]) -> Html:
    return element(
        "div", x_axis(x, x.ticks()), element("span", axes[0], class_="unit"), class_="framed below"
    )


def _axis_title(title: str) -> Html:
    return element("span", title, class_="unit")


def _y_grid(y: Scale, down: _Down) -> list[Html]:
    """Lines across, each with its number to the left of the plot."""
    found = []
    for tick in y.ticks():
        level = down(tick)
        label = element(
            "text", _tick(tick), x=-8, y=coordinate(level), dy="0.35em", text_anchor="end"
        )
        found.append(together(_line(0, level, 100, level, "rule"), label))
    return found


@dataclass(frozen=True)
class _Down:
    """From values to heights, counted from the top, with some room above and below."""

    scale: Scale
    height: float
    room: float = 8

    def __call__(self, value: float) -> float:
        share = self.scale.at(value) / 100
        return self.height - self.room - share * (self.height - 2 * self.room)


def _downward(scale: Scale, height: float) -> _Down:
    return _Down(scale, height)


@dataclass(frozen=True)
class Spread:
    """How values of one layer are spread: lowest, quarters, highest."""

    low: float
    quarter: float
    median: float
    three_quarters: float
    high: float


@dataclass(frozen=True)
class LayerMark:
    """What a chart by layer shows of one layer: spreads side by side, or one column."""

    layer: int
    spreads: Sequence[tuple[str, Spread]]  # series and spread
    tip: str


def by_layer(title: str, marks: Sequence[LayerMark], y: Scale, unit: str) -> Html:
    """For each layer, from left to right, how values are spread: a line, a box and the median."""
    height = 220
    down, width = _downward(y, height), 100 / len(marks)
    found = []
    for index, one in enumerate(marks):
        slot = width / (len(one.spreads) + 0.6)
        shapes = []
        for number, (series, spread) in enumerate(one.spreads):
            left = index * width + (number + 0.3) * slot
            shapes.append(_spread(left, slot, spread, down, series))
        area = element(
            "rect",
            x=f"{coordinate(index * width)}%",
            y=0,
            width=f"{coordinate(width)}%",
            height=height,
            class_="area",
        )
        found.append(mark(one.tip, area, shapes))
    plot = element(
        "svg", _y_grid(y, down), found, class_="plot", height=height, role="presentation"
    )
    return chart(
        title,
        _axis_title(unit),
        element("div", plot, class_="framed"),
        element(
            "div",
            slots([mark_.layer for mark_ in marks]),
            element("span", "layer", class_="unit"),
            class_="framed below",
        ),
    )


def _spread(left: float, slot: float, spread: Spread, down: _Down, series: str) -> Html:
    middle, wide = left + slot / 2, slot * 0.8
    top, bottom = down(spread.three_quarters), down(spread.quarter)
    box = element(
        "rect",
        x=f"{coordinate(left + slot * 0.1)}%",
        width=f"{coordinate(wide)}%",
        y=coordinate(top),
        height=coordinate(max(bottom - top, 2)),
    )
    level = down(spread.median)
    return element(
        "g",
        _line(middle, down(spread.high), middle, down(spread.low)),
        box,
        _line(left + slot * 0.1, level, left + slot * 0.1 + wide, level, "median"),
        class_=f"spread {series}",
    )


def columns(title: str, values: Sequence[tuple[int, float, str]], y: Scale, unit: str) -> Html:
    """One column per layer: its number, its value and its tip."""
    height = 180
    down, width = _downward(y, height), 100 / len(values)
    zero = down(y.low)
    found = []
    for index, (_, value, tip) in enumerate(values):
        level = down(value)
        column = element(
            "rect",
            x=f"{coordinate((index + 0.12) * width)}%",
            width=f"{coordinate(0.76 * width)}%",
            y=coordinate(level),
            height=coordinate(max(zero - level, 0)),
        )
        found.append(mark(tip, column, series="column"))
    plot = element(
        "svg", _y_grid(y, down), found, class_="plot", height=height, role="presentation"
    )
    return chart(
        title,
        _axis_title(unit),
        element("div", plot, class_="framed"),
        element(
            "div",
            slots([layer for layer, _, _ in values]),
            element("span", "layer", class_="unit"),
            class_="framed below",
        ),
    )


def slots(numbers: Sequence[int], most: int = 12) -> Html:
    """An axis of equal slots, such as layers or experts; some of them have their number."""
    width, step = 100 / len(numbers), _slot_step(len(numbers), most)
    labels = [
        element("text", str(number), x=f"{coordinate((i + 0.5) * width)}%", y=14)
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
