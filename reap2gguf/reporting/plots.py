"""Charts with two axes: points, and what layers have from the first to the last."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from reap2gguf.reporting.charts import chart, line, mark, slots, tick_text, x_axis
from reap2gguf.reporting.html import Html, element, together
from reap2gguf.reporting.numbers import coordinate

if TYPE_CHECKING:
    from reap2gguf.reporting.scales import Scale

_WIDEST = 3.5  # percent of the plot that one box takes at most


@dataclass(frozen=True)
class Point:
    """A point of a chart with two axes."""

    x: float
    y: float
    error: float | None
    series: str
    label: str  # written beside it where there is room
    tip: str


def points(
    title: str,
    found: Sequence[Point],
    x: Scale,
    y: Scale,
    axes: tuple[str, str],
    level: tuple[float, str] | None = None,
) -> Html:
    """Points with error bars; the vertical axis grows upward.

    `axes` are the titles of x and y. Points of one label are joined. `level` is a value of y that
    a line across shows, and its tip.
    """
    height = 300
    down = _Down(y, height)
    grid = _y_grid(y, down)
    vertical = [line(x.at(tick), 0, x.at(tick), height, "rule faint") for tick in x.ticks()]
    places = [(x.at(one.x), down(one.y)) for one in found]
    labels = _labels(found, places)
    marks = [
        mark(one.tip, _point(one, place, down), label, series=one.series)
        for one, place, label in zip(found, places, labels, strict=True)
    ]
    across = None if level is None else _level(down(level[0]), level[1])
    joints = _joints(found, places)
    content = (vertical, grid, across, joints, marks)
    plot = element("svg", *content, class_="plot", height=height, role="presentation")
    return chart(
        title, _axis_title(axes[1]), element("div", plot, class_="framed"), _below(x, axes)
    )


def _point(one: Point, place: tuple[float, float], down: _Down) -> list[Html]:
    at, y = place
    circle = element("circle", cx=f"{coordinate(at)}%", cy=coordinate(y), r="5.5")
    if not one.error:
        return [circle]
    bar = line(at, down(one.y - one.error), at, down(one.y + one.error))
    return [element("g", bar, class_="error-bar"), circle]


def _joints(found: Sequence[Point], places: Sequence[tuple[float, float]]) -> list[Html]:
    """A line between the first and the last point of a label."""
    ends: dict[str, list[tuple[float, float]]] = {}
    for one, place in zip(found, places, strict=True):
        ends.setdefault(one.label, []).append(place)
    return [
        line(*of_label[0], *of_label[-1], "joint faint")
        for of_label in ends.values()
        if len(of_label) > 1
    ]


@dataclass(frozen=True)
class _Side:
    """Where a label stands beside its point, in pixels."""

    dx: int
    dy: int
    anchor: str


_SIDES = (
    _Side(10, 4, "start"),
    _Side(-10, 4, "end"),
    _Side(0, -12, "middle"),
    _Side(0, 21, "middle"),
)


def _labels(found: Sequence[Point], places: Sequence[tuple[float, float]]) -> list[Html | None]:
    """Each label once, where it lies over no point and no other label on a phone; else nowhere."""
    boxes = [_box(place, _Side(0, 5, "middle"), 1) for place in places]
    done: set[str] = set()
    labels: list[Html | None] = []
    for one, place in zip(found, places, strict=True):
        side = None if one.label in done else _free_side(one.label, place, boxes)
        if side is None:
            labels.append(None)
            continue
        done.add(one.label)
        boxes.append(_box(place, side, len(one.label)))
        labels.append(
            element(
                "text",
                one.label,
                x=f"{coordinate(place[0])}%",
                y=coordinate(place[1] + side.dy),
                dx=side.dx or None,
                text_anchor=side.anchor,
            )
        )
    return labels


def _free_side(label: str, place: tuple[float, float], boxes: Sequence[_Box]) -> _Side | None:
    for side in _SIDES:
        box = _box(place, side, len(label))
        is_inside = box.left >= 0 and box.right <= _PHONE
        if is_inside and not any(box.meets(other) for other in boxes):
            return side
    return None


_PHONE = 285  # pixels of a plot on a phone
_LETTER = 8  # pixels of a letter


@dataclass(frozen=True)
class _Box:
    left: float
    right: float
    top: float
    bottom: float

    def meets(self, other: _Box) -> bool:
        return (
            self.left < other.right
            and other.left < self.right
            and self.top < other.bottom
            and other.top < self.bottom
        )


def _box(place: tuple[float, float], side: _Side, n_letters: int) -> _Box:
    width, x = n_letters * _LETTER, place[0] / 100 * _PHONE + side.dx
    left = {"start": x, "end": x - width, "middle": x - width / 2}[side.anchor]
    base = place[1] + side.dy
    return _Box(left, left + width, base - 11, base + 1)


def _level(y: float, tip: str) -> Html:
    return mark(tip, line(0, y, 100, y, "level"), series="pruning")


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
            "text", tick_text(tick), x=-8, y=coordinate(level), dy="0.35em", text_anchor="end"
        )
        found.append(together(line(0, level, 100, level, "rule"), label))
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
    down, width = _Down(y, height), 100 / len(marks)
    found = []
    for index, one in enumerate(marks):
        slot = min(width / (len(one.spreads) + 0.6), _WIDEST)
        shapes = []
        for number, (series, spread) in enumerate(one.spreads):
            left = (index + 0.5) * width + (number - len(one.spreads) / 2) * slot
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
        line(middle, down(spread.high), middle, down(spread.low)),
        box,
        line(left + slot * 0.1, level, left + slot * 0.1 + wide, level, "median"),
        class_=f"spread {series}",
    )


def columns(title: str, values: Sequence[tuple[int, float, str]], y: Scale, unit: str) -> Html:
    """One column per layer: its number, its value and its tip."""
    height = 180
    down, width = _Down(y, height), 100 / len(values)
    zero = down(y.low)
    found = []
    wide = min(0.76 * width, 2 * _WIDEST)
    for index, (_, value, tip) in enumerate(values):
        level = down(value)
        column = element(
            "rect",
            x=f"{coordinate((index + 0.5) * width - wide / 2)}%",
            width=f"{coordinate(wide)}%",
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
