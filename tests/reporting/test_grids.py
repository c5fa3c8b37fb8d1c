"""Grids of cells: their paths, and the JSON that says what they are."""

from __future__ import annotations

import json
import re

from reap2gguf.reporting.grids import Strip, cell_grid, data_block, runs_of, strips, tabs
from tests.reports import Node, read_page


def cells(page: Node) -> dict[tuple[int, int], str]:
    """The class of each cell, from the strokes of all paths."""
    found: dict[tuple[int, int], str] = {}
    for path in page.one("svg", "cells").all("path"):
        for x, y, n in re.findall(r"M([\d.]+) (\d+)h([\d.]+)", path.attributes["d"] or ""):
            for column in range(int(float(x)), int(float(x)) + max(1, int(float(n)))):
                assert (int(y), column) not in found
                found[int(y), column] = path.attributes["class"] or ""
    return found


def test_every_cell_is_drawn_once_in_its_class() -> None:
    looks = [["a", "a", "b"], ["", "b", "b"]]
    page = read_page(cell_grid("Grid", [0, 7], 3, runs_of(looks), "data", cut=2))
    assert cells(page) == {
        (0, 0): "a", (0, 1): "a", (0, 2): "b", (1, 1): "b", (1, 2): "b",
    }  # fmt: skip
    assert page.one("path", "cut").attributes["d"] == "M2 -.5V1.5"
    assert [node.text for node in page.one("svg", "row-labels").all("text")] == ["0", "7"]


def test_wide_grids_draw_runs() -> None:
    looks = [["a"] * 512 for _ in range(94)]
    page = read_page(cell_grid("Grid", range(94), 512, runs_of(looks), "data"))
    (path,) = page.one("svg", "cells").all("path")
    assert len(path.attributes["d"] or "") < 94 * 12
    assert len(cells(page)) == 94 * 512


def test_json_cannot_end_its_element() -> None:
    values = {"a": "</script><!--<script>&", "b": [1.5, None]}
    block = data_block("data", values)
    assert block.count("<") == 2
    page = read_page(block)
    assert json.loads(page.one("script").text) == values


def test_strips_fill_their_slots() -> None:
    rows = [("q", [Strip(0, 1, "b2", "x"), Strip(2, 2, "b4", "y")])]
    page = read_page(strips("Bits", rows, [0, 1, 2, 3]))
    found = [(n.attributes["x"], n.attributes["width"]) for n in page.all("rect")]
    assert found == [("0.000%", "25.000%"), ("50.000%", "50.000%")]
    assert [node.text for node in page.all("title")] == ["x", "y"]


def test_panes_are_chosen_without_a_script() -> None:
    page = read_page(tabs("order", [("one", "1"), ("two", "2")]))
    inputs = list(page.all("input"))
    assert [node.attributes["type"] for node in inputs] == ["radio", "radio"]
    assert ["checked" in node.attributes for node in inputs] == [True, False]
    named = {node.attributes["for"]: node.text for node in page.all("label")}
    assert [named[node.attributes["id"]] for node in inputs] == ["one", "two"]
    assert len(list(page.all("div", "pane"))) == 2


def test_one_pane_and_too_many() -> None:
    assert not list(read_page(tabs("one", [("one", "1")])).all("input"))
    many = read_page(tabs("many", [(str(n), "x") for n in range(13)]))
    assert not list(many.all("input"))
    assert len(list(many.one("div", "stacked").all("div", "pane"))) == 13
