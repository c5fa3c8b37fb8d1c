"""Grids of coloured cells: experts by layer, and types of tensors by layer.

A grid of 94 layers of 512 experts has 48,128 cells. Cells of one colour are one path each, of
strokes along the rows, so that the page stays small and opens quickly; what a cell means is in a
block of JSON that the script reads when one points at it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from reap2gguf.reporting.charts import chart, mark, slots
from reap2gguf.reporting.html import Child, Html, element, verbatim

_NARROWEST = 3  # pixels of a column
_NARROWEST_OF_ALL = 950  # pixels of all columns, where they are so many
_MOST_HEIGHT = 640
_MOST_WITH_GAPS = 144  # columns
_MOST_TABS = 12  # as many as style.css has rules for


@dataclass(frozen=True)
class CellClass:
    """Cells of one look: runs (row, first column, number of columns)."""

    name: str
    runs: Sequence[tuple[int, int, int]]


def runs_of(rows: Sequence[Sequence[str]]) -> list[CellClass]:
    """Cells by class, from the class of every cell; "" is left empty."""
    found: dict[str, list[tuple[int, int, int]]] = {}
    for y, row in enumerate(rows):
        first = 0
        for x in range(1, len(row) + 1):
            if x == len(row) or row[x] != row[first]:
                if row[first]:
                    found.setdefault(row[first], []).append((y, first, x - first))
                first = x
    return [CellClass(name, runs) for name, runs in sorted(found.items())]


def cell_grid(
    title: str,
    rows: Sequence[int],
    n_columns: int,
    cells: Sequence[CellClass],
    data: str,
    *,
    cut: int | None = None,
    order: str = "number",
    unit: str = "expert",
) -> Html:
    """A grid whose rows are layers; `data` is the id of the JSON that says what each cell is.

    `cut` draws a line before that column.
    """
    height = _row_height(len(rows)) * len(rows)
    has_gaps = n_columns <= _MOST_WITH_GAPS
    paths: list[Html] = [
        element("path", d="".join(_strokes(one.runs, has_gaps)), class_=one.name) for one in cells
    ]
    line = element("path", d=f"M{cut} -.5V{len(rows) - 0.5}", class_="cut") if cut else None
    drawn = element(
        "svg",
        element("g", paths, line, transform="translate(0 .5)"),
        class_="cells",
        viewBox=f"0 0 {n_columns} {len(rows)}",
        preserveAspectRatio="none",
        width=min(n_columns * _NARROWEST, max(_NARROWEST_OF_ALL, n_columns)),
        height=height,
        data_cells=data,
        data_order=order,
        role="img",
        aria_label=title,
    )
    below = [slots(range(n_columns), 16), element("span", unit, class_="unit")]
    canvas = element("div", drawn, *below, class_="canvas")
    return element(
        "div",
        _row_labels([str(row) for row in rows], height / len(rows)),
        element("div", canvas, class_="scroll bare"),
        class_="grid-box",
    )


def _strokes(runs: Sequence[tuple[int, int, int]], has_gaps: bool) -> Iterator[str]:
    """Runs as strokes; with gaps, each cell is a stroke of its own and a little shorter."""
    for y, x, n in runs:
        if has_gaps:
            yield from (f"M{x + i}.04 {y}h.92" for i in range(n))
        else:
            yield f"M{x} {y}h{n}"


def _row_height(n_rows: int) -> int:
    return max(4, min(26, _MOST_HEIGHT // n_rows))


def _row_labels(names: Sequence[str], height: float) -> Html:
    """The names of rows at the left; of low rows, every second, fourth, ..."""
    step = next(one for one in (1, 2, 4, 8, 16, 32, 64, 2**20) if one * height >= 13)
    texts = [
        element("text", name, x="100%", y=str(round((i + 0.5) * height, 1)), dy="0.35em")
        for i, name in enumerate(names)
        if i % step == 0
    ]
    return element(
        "svg",
        texts,
        class_="row-labels",
        height=str(round(height * len(names))),
        aria_hidden="true",
    )


@dataclass(frozen=True)
class Strip:
    """Equal cells side by side: first slot, number of slots, class and tip."""

    first: int
    count: int
    look: str
    tip: str


def strips(
    title: str, rows: Sequence[tuple[Child, Sequence[Strip]]], numbers: Sequence[int]
) -> Html:
    """Rows of coloured strips over the same slots, such as the layers."""
    width = 100 / max(len(numbers), 1)
    body = []
    for name, found in rows:
        marks = [
            mark(
                one.tip,
                element(
                    "rect",
                    x=f"{one.first * width:.3f}%",
                    width=f"{one.count * width:.3f}%",
                    height=18,
                    y=1,
                    class_=one.look,
                ),
            )
            for one in found
        ]
        track = element("svg", marks, class_="track", height=20, role="presentation")
        body.append(
            element("div", element("span", name, class_="label"), track, class_="row strip")
        )
    axis = element(
        "div",
        element("span", "layer", class_="label unit"),
        slots(numbers, 12),
        class_="row strip axis",
    )
    return chart(title, body, axis)


def data_block(name: str, values: Mapping[str, Any]) -> Html:
    """JSON that a script of the page reads; it can hold no end of an element."""
    raw = json.dumps(values, separators=(",", ":"), ensure_ascii=True)
    safe = raw.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
    return element("script", verbatim(safe), type="application/json", id=name)


def tabs(name: str, panes: Iterable[tuple[str, Child]]) -> Html:
    """Panes of which one is shown, chosen by radio buttons; they need no script. Printed: all."""
    found = list(panes)
    if len(found) == 1:
        return element("div", found[0][1])
    if len(found) > _MOST_TABS:
        bodies = [_pane(title, content) for title, content in found]
        return element("div", bodies, class_="tabs stacked")
    buttons, bodies = [], []
    for number, (title, content) in enumerate(found):
        key = f"{name}-{number}"
        buttons += [
            element("input", type="radio", name=name, id=key, checked=number == 0),
            element("label", title, for_=key),
        ]
        bodies.append(_pane(title, content))
    return element(
        "div", buttons, bodies, class_="tabs", role="group", aria_label="Choose what is shown"
    )


def _pane(title: str, content: Child) -> Html:
    return element("div", element("p", title, class_="pane-title"), content, class_="pane")
