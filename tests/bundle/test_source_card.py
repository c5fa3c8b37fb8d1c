"""Front matter of other people's cards: what is taken, and what is ignored with a sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from reap2gguf.bundle.source_card import read_card

CARD = """---
license: other
license_name: qwen
language:
- en
- no
tags: [chat, "2507"]
version: 1.0
base_model: Qwen/Qwen3-30B-A3B-Base
description: |
  Two
  lines.
---

# Model
"""


@pytest.mark.parametrize(
    "text", [CARD, "\ufeff" + CARD, CARD.replace("\n", "\r\n"), CARD.replace("---\n", "--- \n")]
)
def test_front_matter_is_read(text: str, tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_bytes(text.encode())
    card = read_card(path)
    assert card.texts == {"license_name": "qwen", "version": "1.0", "description": "Two lines."}
    assert card.lists == {
        "license": ["other"],
        "language": ["en", "no"],
        "tags": ["chat", "2507"],
        "base_model": ["Qwen/Qwen3-30B-A3B-Base"],
    }
    assert card.problems == ()


@pytest.mark.parametrize(
    "text",
    ["", "# Model\n", "---\n---\n", "---\n# a comment\n---\n", "text\n---\nlicense: mit\n---\n",
     "---\nlicense: null\ntags:\nlanguage: ~\n---\n"],
)  # fmt: skip
def test_nothing_to_take_is_no_problem(text: str, tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    assert read_card(path).problems == (), "no card"
    path.write_text(text)
    card = read_card(path)
    assert (card.texts, card.lists, card.problems) == ({}, {}, ())


@pytest.mark.parametrize(
    ("front", "reason"),
    [
        ("license: mit", "no second ---"),
        (": no yaml [\n---\n", "not YAML"),
        ("license: \x01\n---\n", "not YAML"),
        ("- a\n- b\n---\n", "expected keys and values"),
        ("just text\n---\n", "expected keys and values"),
        ("[" * 5_000 + "\n---\n", "nested too deep"),
        (
            "license: mit\nwidget: " + "x" * 300_000 + "\n---\n",
            "no second --- within 131,072 bytes",
        ),
        ("license: {a: b}\n---\n", "license is {'a': 'b'}, expected a text"),
        ("license: [[mit]]\n---\n", "license is ['mit'], expected a text"),
        (f"license: {'m' * 501}\n---\n", "expected a text of at most 500 visible letters"),
        ('license: "m\\e[2Jit"\n---\n', "visible letters"),
        ('license: "m\\u202eit"\n---\n', "visible letters"),
        ('license: "m\\u3164it"\n---\n', "visible letters"),
        ("tags:\n" + "- a\n" * 101 + "---\n", "tags has 101 entries, expected at most 100"),
    ],
)
def test_what_cannot_be_used_is_ignored_and_listed(front: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text(f"---\n{front}")
    card = read_card(path)
    assert (card.texts, card.lists) == ({}, {})
    (problem,) = card.problems
    assert problem.startswith(f"{path}: ")
    assert reason in problem
    assert "ignored" in problem


def test_aliases_do_not_multiply(tmp_path: Path) -> None:
    """Nine levels of nine make a billion entries if each is written out."""
    levels = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    levels += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 10)]
    path = tmp_path / "README.md"
    path.write_text("---\n" + "\n".join(levels) + "\ntags: *a9\nlicense: mit\n---\n")
    card = read_card(path)
    assert card.lists == {"license": ["mit"]}
    assert len("".join(card.problems)) < 20_000


def test_a_yaml_tag_makes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text("---\nlicense: !!python/object/apply:os.system [id]\n---\n")
    assert read_card(path).lists == {"license": ["id"]}, "a list of one text, as without the tag"


def test_a_card_that_is_no_file(tmp_path: Path) -> None:
    assert read_card(tmp_path).texts == {}
