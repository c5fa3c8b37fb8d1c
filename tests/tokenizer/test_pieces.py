"""The ids of pieces, one after another, are those of the whole text."""

from __future__ import annotations

import json
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from tokenizers import Tokenizer as Encoder

from reap2gguf.tokenizer.pieces import KNOWN_PATTERNS, cuts_anywhere, next_cut, pieces
from tests.tiny import EXAMPLE
from tests.tokenizer.small_spm import spm_tokenizer
from tests.tokenizer.test_llama_bpe import STEPS, crossing_merges, of_family

PATTERNS = sorted(KNOWN_PATTERNS)
# what a pattern or a normal form might take together with a neighbour
PARTS = (
    *("a", "Z", "the", " word", " ", "  ", "\n", "\r", "\r\n", "\n\n", "\t", "\u00a0", "\u2028"),
    *(
        "'s",
        "'",
        "'LL",
        "1",
        "23",
        "!",
        "...",
        "_",
        "{",
        "/",
        "\\",
        "<|im_start|>",
        "<|im",
        "_end|>",
    ),
    *("\u0301", "e\u0301", "\u0338", "=\u0338", "\u093c", "\u1100\u1161", "\u11a8"),
    *(
        "é",
        "ß",
        "ſ",
        "中",
        "文",
        "。",
        "，",
        "！",
        "、",
        "ひ",
        "に",
        "๑",
        "ก้",
        "א",
        "ً",
        "𝒳",
        "🙂",
        "Ⅷ",
    ),
)
CUTS = ("a| b", ".\n|1", "b\n|é", "\u0301\n|好", "中|。", "'s| it")
texts = st.lists(st.sampled_from(PARTS), max_size=40).map("".join)


def values() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((EXAMPLE / "tokenizer.json").read_text())
    return found


@cache
def encoder(patterns: tuple[str, ...], normalizer: str | None = "NFC") -> Encoder:
    """A tokenizer that splits by some patterns, and whose merges join what none of them does."""
    changed = values()
    vocab, merges = crossing_merges(False)
    changed["model"] |= {"vocab": vocab, "merges": merges}
    split, byte_level = changed["pre_tokenizer"]["pretokenizers"]
    splits = [{**split, "pattern": {"Regex": pattern}} for pattern in patterns]
    changed["pre_tokenizer"]["pretokenizers"] = [*splits, byte_level]
    changed["normalizer"] = {"type": normalizer} if normalizer else None
    return Encoder.from_str(json.dumps(changed))


def ids(of: Encoder, text: str) -> list[int]:
    return list(of.encode(text, add_special_tokens=False).ids)


def all_pieces(text: str) -> list[str]:
    """A text cut wherever it may be."""
    return list(pieces(text, 1))


@pytest.mark.parametrize(
    ("patterns", "normalizer"),
    [*((patterns, "NFC") for patterns in PATTERNS), (PATTERNS[0], None), (PATTERNS[-1], None)],
)
@settings(deadline=None, max_examples=60)
@given(text=texts | st.text(max_size=60))
def test_pieces_have_the_ids_of_the_whole(
    patterns: tuple[str, ...], normalizer: str | None, text: str
) -> None:
    of = encoder(patterns, normalizer)
    found = all_pieces(text)
    assert "".join(found) == text
    assert [one for piece in found for one in ids(of, piece)] == ids(of, text)


@settings(deadline=None)
@given(
    before=texts,
    after=texts,
    cut=st.sampled_from(["a| b", ".\n|1", "b\n|é", "\u0301\n|好", "中|。", "'s| it"]),
)
def test_each_kind_of_cut_beside_anything(before: str, after: str, cut: str) -> None:
    left, right = cut.split("|")
    left, right = before + left, right + after
    assert next_cut(left + right, len(left)) == len(left)
    for patterns in PATTERNS:
        of = encoder(patterns)
        assert ids(of, left) + ids(of, right) == ids(of, left + right)


def test_the_text_is_cut_in_many_places() -> None:
    code = (EXAMPLE / "README.md").read_text()
    assert len(all_pieces(code)) > len(code) / 40
    chinese = "他说，今天很好。明天，再见！" * 20
    assert len(all_pieces(chinese)) == 81
    assert all(first <= 300 for first in map(len, pieces(code, 200)))


def test_a_text_without_a_cut_is_one_piece() -> None:
    for text in ("", "   ", "0123456789" * 50, "-" * 300, "\n" * 300):
        assert all_pieces(text) == [text]
        assert list(pieces(text)) == [text]
    assert next_cut("abc def", 5) == 7
    assert next_cut("abc def", 0) == 0
    assert next_cut("abc def", 1) == 3


@settings(deadline=None)
@given(text=texts, size=st.integers(1, 30))
def test_pieces_are_as_long_as_asked(text: str, size: int) -> None:
    found = list(pieces(text, size))
    assert "".join(found) == text
    assert all(len(one) >= size for one in found[:-1])
    assert all(one and other for one, other in pairwise(found))


@pytest.mark.parametrize("name", STEPS)
def test_published_tokenizers_are_cut(name: str) -> None:
    of = Encoder.from_str(json.dumps(of_family(name)))
    assert cuts_anywhere(of)
    text = (EXAMPLE / "README.md").read_text()
    assert [one for piece in all_pieces(text) for one in ids(of, piece)] == ids(of, text)


def test_all_patterns_can_be_cut() -> None:
    assert cuts_anywhere(Encoder.from_file(str(EXAMPLE / "tokenizer.json")))
    for patterns in PATTERNS:
        assert cuts_anywhere(encoder(patterns))


def test_what_is_not_known_is_not_cut() -> None:
    assert not cuts_anywhere(encoder((r"\s+|\S+",)))
    assert not cuts_anywhere(Encoder.from_str(json.dumps(spm_tokenizer())))
    assert not cuts_anywhere(encoder(PATTERNS[0], "NFKC"))
    for change in (
        {"pre_tokenizer": None},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}},
        {"model": values()["model"] | {"dropout": 0.1}},
        {"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}, "added_tokens": []},
    ):
        assert not cuts_anywhere(Encoder.from_str(json.dumps(values() | change)))
    for step, settings_of_step in ((0, {"behavior": "Removed"}), (1, {"use_regex": True})):
        changed = values()
        changed["pre_tokenizer"]["pretokenizers"][step] |= settings_of_step
        assert not cuts_anywhere(Encoder.from_str(json.dumps(changed)))
    prefixed = values()
    prefixed["pre_tokenizer"]["pretokenizers"][1]["add_prefix_space"] = True
    assert not cuts_anywhere(Encoder.from_str(json.dumps(prefixed)))


@pytest.mark.parametrize(
    "token",
    [
        AddedToken("<mask>", lstrip=True),
        AddedToken("<mask>", rstrip=True),
        AddedToken("<mask>", single_word=True),
        AddedToken("two words"),
        AddedToken("line\nbreak", special=True),
    ],
)
def test_added_tokens_that_reach_over_a_cut(token: AddedToken) -> None:
    of = Encoder.from_file(str(EXAMPLE / "tokenizer.json"))
    of.add_tokens([AddedToken("<one>")])
    assert cuts_anywhere(of)
    of.add_tokens([token])
    assert not cuts_anywhere(of)
