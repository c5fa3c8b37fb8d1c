"""Tables with a caption, which a script of the page sorts by any column.

A cell carries the exact value that it shows in `data-value`; that is what sorts, and what a program
can read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from reap2gguf.messages import size
from reap2gguf.reporting.html import Child, Html, element
from reap2gguf.reporting.numbers import estimate, exact, plain

if TYPE_CHECKING:
    from reap2gguf.bundle.evaluation import Estimate

NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Cell:
    """What a cell shows; `value` sorts it, None sorts last."""

    shown: Child
    value: float | str | None = None
    is_best: bool = False


@dataclass(frozen=True)
class Column:
    """A column; numbers are aligned to the right."""

    title: str
    is_number: bool = True
    note: str = ""  # the unit or the meaning, under the title


def words(shown: str, content: Child = None) -> Cell:
    """A text, or content that is sorted by a text."""
    return Cell(shown if content is None else content, shown)


def count(value: int) -> Cell:
    return Cell(f"{value:,}", value)


def number(value: float, shown: str | None = None) -> Cell:
    return Cell(plain(value) if shown is None else shown, value)


def byte_size(n_bytes: int, more: str = "") -> Cell:
    return Cell(size(n_bytes) + more, n_bytes)


def measured(found: Estimate | None, scale: float = 1.0, plus: bool = False) -> Cell:
    """A figure with its standard error, in two spans; "not measured" without one."""
    if found is None:
        return missing()
    value, error = estimate(found, scale)
    sign = "+" if plus and found.value > 0 else ""
    shown = [
        element("span", f"{sign}{value}", class_="value"),
        element("span", f" ± {error}", class_="error", data_error=exact(found.error)),
    ]
    return Cell(shown, found.value)


def missing(why: str = NOT_MEASURED) -> Cell:
    return Cell(element("span", why, class_="none"))


def table(
    caption: str, columns: Sequence[Column], rows: Sequence[Sequence[Cell]], note: str = ""
) -> Html:
    """A table; the first cell of a row is its heading. It scrolls sideways where it must."""
    heads = [
        element(
            "th",
            element("span", column.title),
            element("small", column.note) if column.note else None,
            scope="col",
            class_="number" if column.is_number else None,
        )
        for column in columns
    ]
    body = [element("tr", _cells(columns, row)) for row in rows]
    found = element(
        "table",
        element("caption", caption, element("small", note) if note else None),
        element("thead", element("tr", heads)),
        element("tbody", body),
        class_="sortable" if len(rows) > 1 else None,
    )
    return element("div", found, class_="scroll", role="region", aria_label=caption, tabindex=0)


def _cells(columns: Sequence[Column], row: Sequence[Cell]) -> list[Html]:
    found = []
    for index, (column, cell) in enumerate(zip(columns, row, strict=True)):
        classes = " ".join(["number"] * column.is_number + ["best"] * cell.is_best)
        value = exact(cell.value) if isinstance(cell.value, float) else cell.value
        found.append(
            element(
                "td" if index else "th",
                cell.shown,
                class_=classes or None,
                scope=None if index else "row",
                data_value=value,
            )
        )
    return found


def facts(rows: Sequence[tuple[str, Child]]) -> Html:
    """Names and values, one pair per line."""
    pairs = [element("div", element("dt", name), element("dd", shown)) for name, shown in rows]
    return element("dl", pairs, class_="facts")
