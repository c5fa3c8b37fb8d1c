"""Points and charts by layer."""

from __future__ import annotations

from reap2gguf.reporting.plots import LayerMark, Point, Spread, by_layer, columns, points
from reap2gguf.reporting.scales import Scale
from tests.reports import Node, read_page

X, Y = Scale(0, 10), Scale(0.01, 1, is_log=True)


def plot(*found: Point, level: tuple[float, str] | None = None) -> Node:
    return read_page(points("Chart", found, X, Y, ("size", "nats"), level))


def test_points_lie_at_their_values() -> None:
    page = plot(Point(5, 0.1, 0.01, "both", "Q4", "tip"), level=(0.1, "level"))
    circle = page.one("circle")
    assert (circle.attributes["cx"], circle.attributes["cy"]) == ("50%", "150")
    assert page.one("line", "level").attributes["y1"] == "150"
    assert [node.text for node in page.all("title")] == ["level", "tip"]


def labels(page: Node) -> list[str]:
    return [text.text for one in page.all("g", "mark") for text in one.all("text")]


def test_a_label_is_written_once_and_its_points_are_joined() -> None:
    page = plot(
        Point(5, 0.5, None, "both", "Q4", "a"), Point(5, 0.05, None, "quantizing", "Q4", "b")
    )
    assert labels(page) == ["Q4"]
    joint = page.one("line", "joint")
    assert joint.attributes["x1"] == joint.attributes["x2"] == "50%"


def test_labels_do_not_lie_over_one_another() -> None:
    crowd = [Point(5 + n / 100, 0.1, None, "both", f"LABEL{n}", "tip") for n in range(9)]
    page = plot(*crowd)
    places = {
        (node.attributes["y"], node.attributes["text-anchor"])
        for one in page.all("g", "mark")
        for node in one.all("text")
    }
    assert len(labels(page)) == len(places) < 9  # the tips have the others
    assert len(list(page.all("title"))) == 9


def test_columns_grow_from_the_axis() -> None:
    page = read_page(columns("Chart", [(0, 0.0, "a"), (7, 100.0, "b")], Scale(0, 100), "%"))
    heights = [float(node.attributes["height"] or "") for node in page.all("rect")]
    assert heights == [0, 164]
    assert [node.text for node in page.one("svg", "slots").all("text")] == ["0", "7"]


def test_spreads_show_all_five_numbers() -> None:
    spread = Spread(1, 2, 5, 8, 9)
    marks = [LayerMark(3, [("source", spread), ("both", spread)], "Layer 3")]
    page = read_page(by_layer("Chart", marks, Scale(0, 10), "times"))
    assert [node.attributes["class"] for node in page.all("g", "spread")] == [
        "spread source", "spread both",
    ]  # fmt: skip
    one = next(page.all("g", "spread"))
    box = one.one("rect")
    top = float(box.attributes["y"] or "")
    bottom = top + float(box.attributes["height"] or "")
    (whisker, median) = one.all("line")
    level = float(median.attributes["y1"] or "")
    high, low = (float(whisker.attributes[y] or "") for y in ("y1", "y2"))
    assert high < top < level < bottom < low
    assert round(level) == 110  # the middle of 220
