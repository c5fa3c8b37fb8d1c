"""Whatever a text from outside holds, a card keeps its structure, and so does a Modelfile."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markdown_it.token import Token

from reap2gguf.bundle.card import gguf_body, gguf_card, hf_body, hf_card
from reap2gguf.bundle.card_files import CardNames
from reap2gguf.bundle.front_matter import front_matter
from reap2gguf.bundle.manifest import ComponentRecord, Manifest, SideRecord
from reap2gguf.bundle.markdown import argument, code, hub_link, inline, quoted, table
from reap2gguf.bundle.modelfile import modelfile
from reap2gguf.messages import is_visible, one_line
from tests.conftest import Bundle

NASTY = [
    "a|b", "\\|", "\\\\|", "`", "``|``", "# no heading", "\n# heading\n", "\r\n\r\n| a | b |",
    "<img src=x onerror=alert(1)>", "<!--", "[a](https://evil.example)", "![a](b)", "&lt;b&gt;",
    "https://evil.example", "www.evil.example", "a@evil.example", "<https://evil.example>",
    "**bold**", "_a_", "~~a~~", "\x1b[2J", "\u202eevil", "\u200b", "\u2028", "\ufeff", "\u3164",
    "1. one", "- one", "```", "~~~", "---", "===", "> quote", "[^1]: note", ":smile:", "$x$", "",
    " ", "\t", "a" * 5000, "\ud800", "C:\\dir|x", '"""', "$(id)", "`id`", "{{ .Prompt }}", "\\",
]  # fmt: skip
PIECES = st.sampled_from([*NASTY, *"|`\\*_[]()<>#!~&$\n\r -=+.:'\"/aZ0é中"])
TEXTS = st.one_of(
    st.text(max_size=50),
    st.lists(PIECES, max_size=8).map("".join),
    st.text(alphabet="|\\` ", max_size=300),
)
PARSER = MarkdownIt("commonmark").enable(["table", "strikethrough"])


@pytest.fixture(scope="module")
def manifest(built: Bundle) -> Manifest:
    """With a projector, an MTP block and parts, so that every part of the cards is there."""
    found = Manifest.load(built.gguf)
    mtp = replace(found.pruning.mtp, state="pruned", hits_before=1, n_tokens=2)
    first, second = found.gguf
    parts = ("x-00001-of-00002.gguf", "x-00002-of-00002.gguf")
    return replace(
        found,
        pruning=replace(found.pruning, mtp=mtp),
        gguf=(first, replace(second, parts=parts)),
        side_files=(SideRecord("mmproj-x-F16.gguf", "vision projector", 5, {}),),
        source=replace(found.source, architecture="Qwen3_5MoeForConditionalGeneration"),
    )


SEEN_BY_EXPERTS = "Tokens of the importance matrix that the experts saw"


def spoiled(manifest: Manifest, text: str) -> Manifest:
    """Every text of the manifest that a card prints is `text`."""
    source = replace(manifest.source, label=text, revision=text)
    pruning = replace(
        manifest.pruning, method=text, mtp=replace(manifest.pruning.mtp, hits_before=1)
    )
    component = ComponentRecord(text, text, text, None, 1, 2, 3)
    on_hub = replace(component, revision=text)
    calibration = replace(manifest.calibration, spec=text, components=(component, on_hub))
    records = tuple(
        replace(record, title=text, recipe=text, file_type=text) for record in manifest.gguf
    )
    return replace(
        manifest,
        source=source,
        pruning=pruning,
        calibration=calibration,
        gguf=records,
        side_files=tuple(replace(side, title=text) for side in manifest.side_files),
        verification={"summary": text},
        program={"reap2gguf": text},
    )


def structure(card: str) -> list[Any]:
    """Blocks with their level, links with their target, code blocks; all but words and code."""
    return [*_structure(PARSER.parse(card))]


def _structure(tokens: list[Token]) -> Iterator[Any]:
    for token in tokens:
        if token.type == "inline":
            yield from _structure(token.children or [])
        elif token.type == "fence":
            yield token.type, token.info, len(token.content.splitlines())
        elif token.type == "html_block":
            yield token.type, token.content, None
        elif token.type == "image":
            yield token.type, token.attrGet("src"), None
        elif token.type not in ("text", "code_inline", "text_special", "softbreak"):
            yield token.type, token.tag, token.attrGet("href")


def both(manifest: Manifest, source_card: Path) -> tuple[str, str]:
    return hf_card(manifest, source_card), gguf_card(manifest, source_card)


@settings(max_examples=30, deadline=None)
@given(TEXTS)
@example("a/b\n# c")
@example("\ud800\\|`")
def test_a_cards_structure_is_its_own(built: Bundle, manifest: Manifest, text: str) -> None:
    expected = both(spoiled(manifest, "plain words"), built.source / "README.md")
    found = both(spoiled(manifest, text), built.source / "README.md")
    for one, other in zip(found, expected, strict=True):
        front = front_matter(one)
        assert (
            yaml.safe_load(front[4:-6]).keys() == yaml.safe_load(front_matter(other)[4:-6]).keys()
        )
        body = one.removeprefix(front)
        assert all(map(is_visible, body.splitlines()))
        assert len(body) < len(other) + 40_000
        names = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
        if not names.fullmatch(text):  # else it is linked, as a name on the Hub
            assert structure(body) == structure(other.removeprefix(front_matter(other)))


@settings(max_examples=20, deadline=None)
@given(TEXTS.filter(lambda text: "/" not in text and "\0" not in text))
def test_names_of_files_change_nothing_either(built: Bundle, manifest: Manifest, text: str) -> None:
    """A manifest that is not ours may hold them."""
    records = tuple(
        replace(r, file=f"{text}.gguf", label=text, parts=(f"{text}-1.gguf",) if r.parts else ())
        for r in manifest.gguf
    )
    sides = tuple(replace(side, file=text) for side in manifest.side_files)
    named = replace(manifest, name=text, gguf=records, side_files=sides)
    for on_hub in (False, True):
        card = hf_body(named, CardNames(text, f"{text}-GGUF", on_hub))
        card += gguf_body(named, CardNames(text, f"{text}-GGUF", on_hub), True)
        assert all(map(is_visible, card.splitlines()))
        found = structure(card)
        assert not {entry[0] for entry in found} & {"html_inline", "blockquote_open"}
        html = {entry[1] for entry in found if entry[0] == "html_block"}
        folded = ("Experts removed in each layer", SEEN_BY_EXPERTS)
        opening = {f"<details>\n<summary>{summary}</summary>\n" for summary in folded}
        assert html == {*opening, "</details>\n"}
        assert {entry[1] for entry in found if entry[0] == "image"} == {*manifest.pictures}
        headings = [token.tag for token in PARSER.parse(card) if token.type == "heading_open"]
        whole = hf_body(manifest, CardNames("a", "a-GGUF")) + gguf_body(
            manifest, CardNames("a", "a-GGUF")
        )
        assert headings == [t.tag for t in PARSER.parse(whole) if t.type == "heading_open"]
    lines = modelfile(named, built.source).splitlines()
    expected = modelfile(manifest, built.source).splitlines()
    assert [line.split(" ")[0] for line in lines] == [line.split(" ")[0] for line in expected]
    assert all(map(is_visible, lines))


@settings(max_examples=200, deadline=None)
@given(TEXTS)
@example("a" * 99 + "\\" * 300 + "|")
def test_a_cell_holds_one_text(text: str) -> None:
    """As Markdown's own parser reads it, the text is code or plain words in one cell."""
    for shown in (inline(text), code(text), hub_link(text)):
        tokens = PARSER.parse(table(("a", "b"), [(shown, "end")]))
        cells = [token for token in tokens if token.type == "inline"]
        assert [cell.content for cell in cells[:2]] == ["a", "b"]
        assert cells[3].content == "end"
        assert len(cells) == 4
        kinds = [child.type for child in cells[2].children or []]
        assert kinds in (["text"], ["code_inline"], ["link_open", "text", "link_close"])
        assert is_visible(cells[2].content)


@pytest.mark.parametrize(
    "text",
    [
        "Unsloth-style 4-bit: Q8_0 for critical tensors, Q5_K for the experts' down projections",
        "Plain Q4_K_M, llama.cpp's own mixture", "tiny-qwen3-moe-REAP-0.25-GGUF", "0.1.0",
        "Qwen3.5-35B-A3B", "3 checks passed", "vision projector", "中文 模型",
    ],
)  # fmt: skip
def test_plain_words_remain_plain(text: str) -> None:
    assert inline(text) == text


@pytest.mark.parametrize("text", [*NASTY, "name.com", "a:b", "a__b", "x.py"])
def test_other_words_become_code(text: str) -> None:
    assert inline(text) == code(text)


def test_code_says_what_the_text_says() -> None:
    assert code("a|b") == "`a\\|b`"
    assert code("\\") == "`\\\\`"
    assert code("a`b") == "``a`b``"
    assert code("`") == "`` ` ``"
    assert code("\u202ea\n") == "`\\u202ea\\n`"
    assert code(" ") == code("") == "(empty)"
    assert len(code("x" * 10_000)) < 250


def test_links_are_to_names_of_the_hub_alone() -> None:
    assert hub_link("a/b", "datasets/") == "[a/b](https://huggingface.co/datasets/a/b)"
    assert hub_link("a/b", text="a/b[c]") == "[`a/b[c]`](https://huggingface.co/a/b)"
    for name in ("a/b)", "../b", "a/b/c", "a/", "ä/b", "a b"):
        assert hub_link(name) == code(name)


@pytest.mark.parametrize("text", NASTY)
def test_arguments_and_strings_stay_in_their_line(text: str) -> None:
    assert is_visible(argument(text))
    assert is_visible(quoted(text))
    if text.isascii() and text.isprintable() and len(text) < 200:
        assert shlex.split(argument(text)) == [text]


@pytest.mark.parametrize("letter", ["\u034f", "\u115f", "\u3164", "\ufe0f", "\U000e0101", "\u2800"])
def test_hidden_letters_are_shown(letter: str) -> None:
    assert not is_visible(f"a{letter}b")
    assert one_line(f"a{letter}b") == "a" + letter.encode("unicode_escape").decode() + "b"
