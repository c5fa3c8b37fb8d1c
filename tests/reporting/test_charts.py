"""Rows of dots: positions, error bars and what is said of each mark."""

from __future__ import annotations

from reap2gguf.reporting.charts import (
    Dot,
    DotRow,
    Legend,
    chart,
    dot_rows,
    figure,
    legend,
    mark,
    slots,
)
from reap2gguf.reporting.scales import Scale
from tests.reports import Node, read_page

SCALE = Scale(0, 100)


def circles(page: Node) -> list[str | None]:
    return [node.attributes["cx"] for node in page.all("circle")]


def test_dots_lie_at_their_values() -> None:
    rows = [
        DotRow("a <b>", [Dot(25, None, "source", "a\nof <b>")], "25"),
        DotRow("c", [Dot(50, 10, "both", "c"), Dot(75, 5, "pruning", "d")], "x", is_joined=True),
    ]
    page = read_page(dot_rows("Chart", rows, SCALE, "nats"))
    assert circles(page) == ["25%", "50%", "75%"]
    assert [node.text for node in page.all("title")] == ["a\nof <b>", "c", "d"]
    bar = next(page.all("g", "error-bar"))
    assert [next(bar.all("line")).attributes[x] for x in ("x1", "x2")] == ["40%", "60%"]
    assert [node.text for node in page.all("span", "label")] == ["a <b>", "c", ""]
    assert page.one("div", "axis").one("svg").text == "020406080100"


def test_bars_of_one_row_do_not_lie_over_one_another() -> None:
    dots = [Dot(50, 10, "source", "a"), Dot(52, 10, "pruning", "b"), Dot(54, 10, "both", "c")]
    page = read_page(dot_rows("Chart", [DotRow("a", dots)], SCALE, ""))
    heights = [float(node.attributes["cy"] or "") for node in page.all("circle")]
    assert heights[1] - heights[0] == heights[2] - heights[1] > 8
    (track, _) = page.all("svg", "track")
    assert float(track.attributes["height"] or "") > heights[2]


def test_a_stem_begins_at_zero() -> None:
    row = DotRow("a", [Dot(60, None, "source", "a")], has_stem=True)
    page = read_page(dot_rows("Chart", [row], SCALE, ""))
    stem = page.one("line", "stem")
    assert (stem.attributes["x1"], stem.attributes["x2"]) == ("0%", "60%")


def test_a_chart_is_named() -> None:
    page = read_page(figure("f", "Title", chart("Chart", mark("<tip>")), note="Note"))
    assert page.one("figure").attributes["id"] == "f"
    assert page.one("figcaption").text == "TitleNote"
    assert page.one("div", "chart").attributes == {
        "class": "chart", "role": "group", "aria-label": "Chart",
    }  # fmt: skip
    assert page.one("title").text == "<tip>"


def test_legends_and_slots() -> None:
    page = read_page(legend([Legend("both", "Both"), Legend("source", "Source")]))
    assert [node.text for node in page.all("li")] == ["Both", "Source"]
    assert [node.attributes["class"] for node in page.all("circle")] == ["both", "source"]
    for count, first in ((4, ["0", "1", "2", "3"]), (94, ["0", "8", "16"])):
        labels = [node.text for node in read_page(slots(range(count))).all("text")]
        assert labels[: len(first)] == first
        assert len(labels) <= 12
