"""Elements: everything is escaped, and nothing can be loaded or run."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reap2gguf.reporting.html import code, commands, element, hub_link, lines, text, together
from tests.reports import read_page

HOSTILE = '"><script>alert(1)</script><img src=x onerror=alert(1)>&amp;\u202e\x00'


def test_texts_are_escaped() -> None:
    found = element("p", HOSTILE, title=HOSTILE)
    node = read_page(found).one("p")
    assert node.children == [node.attributes["title"]]
    assert "<script" not in found
    assert "<img" not in found
    assert "\\u202e\\x00" in node.text


@given(st.text())
def test_any_text_is_one_text(value: str) -> None:
    node = read_page(element("p", value, data_value=value)).one("p")
    assert not list(node.all())
    assert node.text == (node.attributes["data-value"] or "")


def test_children_of_every_kind() -> None:
    found = element("ul", [element("li", "<"), None], [], ["a", ["b"]], hidden=True, id=None)
    assert found == "<ul hidden><li>&lt;</li>ab</ul>"
    assert element("meta", charset="utf-8") == '<meta charset="utf-8">'
    assert together("<", None) == "&lt;"
    assert lines("a\n<b") == "a\n&lt;b"
    assert commands("a 'b'", "c") == '<pre tabindex="0"><code>a &#x27;b&#x27;\nc</code></pre>'
    assert text("a\nb") == "a\\nb"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("href", "https://example.org/"),
        ("href", "javascript:alert(1)"),
        ("src", "//example.org/x.js"),
        ("href", "HTTPS://huggingface.co.example.org/"),
        ("onclick", "alert(1)"),
        ("style", "color: red"),
        ('x"y', "z"),
    ],
)
def test_attributes_that_load_or_run_are_refused(name: str, value: str) -> None:
    with pytest.raises(ValueError, match=r"is not an attribute|expected a place in the page"):
        element("a", "x", **{name: value})


def test_an_element_has_a_name() -> None:
    with pytest.raises(ValueError, match="is not the name of an element"):
        element("p onclick=x")


def test_links_go_to_repositories_only() -> None:
    link = read_page(hub_link("owner/name", "datasets/", "owner/name[all]")).one("a")
    assert link.attributes["href"] == "https://huggingface.co/datasets/owner/name"
    assert link.text == "owner/name[all]"
    for name in ("name", "../../etc", "a/b/c", "owner/na me", 'owner/"x'):
        assert hub_link(name) == code(name)
