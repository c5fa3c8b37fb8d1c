from __future__ import annotations

import json
from pathlib import Path
from random import Random
from time import process_time
from typing import Any

import pytest
from tokenizers import Tokenizer as Library

from reap2gguf.errors import CheckpointError, Reap2ggufError, UnsupportedModelError
from reap2gguf.tokenizer.added_tokens import MOST_ADDED
from reap2gguf.tokenizer.llama_bpe import LlamaBpe
from reap2gguf.tokenizer.pre_tokenizers import PRE_TOKENIZERS
from reap2gguf.tokenizer.vocabulary import Vocabulary, read_vocabulary
from tests.tokenizer.small import SMALL_SIZE, added, tokenizer

WHERE = Path("m/tokenizer.json")


def read(*tokens: dict[str, Any], size: int = SMALL_SIZE + 9, **model: Any) -> Vocabulary:
    description = tokenizer(added=list(tokens))
    description["model"].update(model)
    return read_vocabulary(description, size, WHERE)


def vocab(**changes: Any) -> dict[str, Any]:
    """The small vocabulary, with tokens changed, and without those that are None."""
    found = tokenizer()["model"]["vocab"] | changes
    return {text: index for text, index in found.items() if index is not None}


def test_a_vocabulary() -> None:
    found = read(added(257, "<x>", special=True, normalized=True))
    assert found.tokens[:3] == ["a", "b", "ab"]
    assert found.tokens[257:259] == ["<x>", "[PAD258]"]
    assert found.merges == [("a", "b")]
    assert found.added[0].special
    assert found.added[0].normalized
    assert found.normalizes


@pytest.mark.parametrize(
    ("model", "error", "words"),
    [
        ({"vocab": vocab(zz=2)}, CheckpointError, r"'ab' and 'zz' have the same id 2, expected"),
        ({"vocab": vocab(**{"z z": 257})}, UnsupportedModelError, r"'z z' .* stand for no byte"),
        ({"vocab": vocab(中=257)}, UnsupportedModelError, r"'中' with the id 257 .* for no byte"),
        ({"vocab": vocab(**{"": 257})}, UnsupportedModelError, r"'' with the id 257"),
        ({"vocab": vocab(Q=None)}, UnsupportedModelError, r"no token for 1 bytes, .* 0x51 \('Q'\)"),
        ({"vocab": vocab(**{"<PRE>": 257})}, UnsupportedModelError, r"'<PRE>' .* special one for"),
        ({"vocab": vocab(**{"[PAD260]": 257})}, UnsupportedModelError, r"257 and 260 have both"),
        ({"merges": [["a", "q"]]}, CheckpointError, r"merge 0 joins 'a' and 'q', but 'aq' is not"),
        ({"merges": [["a", "zz"]]}, CheckpointError, r"but 'zz' is not in the vocabulary"),
        ({"merges": [["a", "b"], ["a", "b"]]}, UnsupportedModelError, r"0 and 1 both join 'a'"),
        ({"merges": ["a b", ["a", "b"]]}, CheckpointError, "merges have two forms"),
        ({"merges": []}, CheckpointError, "no merges"),
    ],
)
def test_what_a_header_cannot_hold_is_refused(
    model: dict[str, Any], error: type[Reap2ggufError], words: str
) -> None:
    with pytest.raises(error, match=words):
        read(**model)


@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "single_word"])
def test_added_tokens_that_take_more_or_less_than_their_text_are_refused(flag: str) -> None:
    with pytest.raises(UnsupportedModelError, match=rf"'<x>' has {flag} True, expected False"):
        read(added(257, "<x>", **{flag: True}))


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        ([added(257, "<x>"), added(258, "<x>")], "'<x>' is there twice"),
        ([added(257, "ab")], r"'ab' has the id 257, but the vocabulary has it as 2"),
        ([added(5, "<x>")], r"have the same id 5"),
        ([added(257, "")], "has 0 bytes, expected 1 to 1,000"),
        ([added(257, "x" * 1001)], "has 1,001 bytes"),
        ([added(257, "<x>", normalized=2)], "expected true or false"),  # type: ignore[arg-type]
        ([added(257, "e\u0301", normalized=True)], "is normalized to NFC before"),
        ([added(257, "</s>"), added(258, "<|tool_response>")], "expected not both"),
    ],
)
def test_broken_added_tokens_are_refused(tokens: list[dict[str, Any]], words: str) -> None:
    with pytest.raises(Reap2ggufError, match=words):
        read(*tokens)


@pytest.mark.parametrize(
    ("one", "other", "good"),
    [
        (added(257, "<ab>"), added(258, "<ab"), True),  # one begins the other: the longest wins
        (added(257, "<xy>"), added(258, "xy"), True),  # inside the other
        (added(257, "<ab>"), added(258, "b>"), True),
        (added(257, "<abc"), added(258, "c>"), True),  # the left one is longer, and first for both
        (added(257, "<c"), added(258, "c>"), False),  # equally long: llama.cpp defines no order
        (added(257, "<c"), added(258, "cd>"), False),
        (added(257, "<abc", normalized=True), added(258, "c>"), False),
        (added(257, "<c"), added(258, "cd>", normalized=True), False),
        (added(257, "<abc"), added(258, "c>", normalized=True), True),
        (added(257, "<xy>", normalized=True), added(258, "xy"), False),
        (added(257, "<xy>"), added(258, "xy", normalized=True), True),
        (added(257, "\n\n"), added(258, "\n\n\n"), True),  # the longer one begins there as well
        (added(257, "\n\n", normalized=True), added(258, "\n\n\n"), True),
        (added(257, "\n\n"), added(258, "\n\n\n", normalized=True), False),
    ],
)
def test_overlapping_tokens(one: dict[str, Any], other: dict[str, Any], good: bool) -> None:
    if good:
        assert len(read(one, other).added) == 2
        return
    with pytest.raises(UnsupportedModelError, match=r"can overlap in a text.*rename one of them"):
        read(one, other)


def test_accepted_sets_of_tokens_make_the_ids_of_the_library() -> None:
    """Sets that overlap in every way, in texts of their own letters."""
    draw = Random(0)
    n_accepted = n_refused = 0
    for _ in range(400):
        texts = {
            "".join(draw.choices("<xéy", k=draw.randint(2, 5))) for _ in range(draw.randint(2, 3))
        }
        normalized = draw.choice([(True,), (False,), (True, False)])
        tokens = [
            added(257 + i, text, normalized=draw.choice(normalized))
            for i, text in enumerate(sorted(texts))
        ]
        try:
            found = read(*tokens)
        except UnsupportedModelError:
            n_refused += 1
            continue
        n_accepted += 1
        library = Library.from_str(json.dumps(tokenizer(added=tokens)))
        ours = LlamaBpe(found.tokens, found.types, found.merges, PRE_TOKENIZERS["qwen2"])
        for _ in range(20):
            text = "".join(draw.choices("<xéy", k=40))
            assert ours.encode(text) == library.encode(text).ids
    assert n_accepted > 100
    assert n_refused > 100


def test_many_added_tokens_take_little_time() -> None:
    tokens = [added(257 + i, f"<|reserved_special_token_{i}|>") for i in range(3000)]
    before = process_time()
    assert len(read(*tokens, size=4000).added) == 3000
    assert process_time() - before < 10
    with pytest.raises(UnsupportedModelError, match=r"added tokens, expected at most 10,000"):
        read(*[added(i, str(i)) for i in range(MOST_ADDED + 1)])
