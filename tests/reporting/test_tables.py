"""Tables: captions, headings, and the values that sort them."""

from __future__ import annotations

from reap2gguf.bundle.evaluation import Estimate
from reap2gguf.reporting.tables import (
    Column,
    byte_size,
    count,
    facts,
    measured,
    missing,
    number,
    table,
    words,
)
from tests.reports import read_page, table_of

COLUMNS = [Column("file", is_number=False), Column("size", note="of it"), Column("score")]


def test_cells_carry_the_values_that_sort_them() -> None:
    rows = [
        [words("<a>"), byte_size(2**30), measured(Estimate(0.1 + 0.2, 0.01), 100)],
        [words("b"), count(12_345), missing()],
        [words("c"), number(2.5), measured(None)],
    ]
    page = read_page(table("Files <1>", COLUMNS, rows, "a note"))
    found = table_of(page, "Files <1>")
    assert [row["file"].attributes["data-value"] for row in found] == ["<a>", "b", "c"]
    assert [row["size"].attributes["data-value"] for row in found] == [
        "1073741824", "12345", "2.5",
    ]  # fmt: skip
    assert float(found[0]["score"].attributes["data-value"] or "") == 0.1 + 0.2
    assert found[0]["score"].text == "30.0 ± 1.0"
    assert found[1]["score"].text == found[2]["score"].text == "not measured"
    assert "data-value" not in found[1]["score"].attributes


def test_a_table_can_be_read_aloud() -> None:
    page = read_page(table("Files", COLUMNS, [[words("a"), count(1), count(2)]] * 2))
    assert all(head.attributes["scope"] == "col" for head in page.one("thead").all("th"))
    assert all(row.one("th").attributes["scope"] == "row" for row in page.one("tbody").all("tr"))
    region = page.one("div", "scroll")
    assert region.attributes["aria-label"] == "Files"
    assert region.attributes["tabindex"] == "0"
    assert page.one("table").attributes["class"] == "sortable"


def test_one_row_is_not_sorted() -> None:
    page = read_page(table("Files", COLUMNS, [[words("a"), count(1), count(2)]]))
    assert "class" not in page.one("table").attributes


def test_names_and_values() -> None:
    page = read_page(facts([("a", "<1>"), ("b", "2")]))
    assert [node.text for node in page.all("dt")] == ["a", "b"]
    assert [node.text for node in page.all("dd")] == ["<1>", "2"]
