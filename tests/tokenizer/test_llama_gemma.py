from __future__ import annotations

from pathlib import Path

import pytest
from gguf import TokenType
from tokenizers import Tokenizer as Library

from reap2gguf.models.tokenizer_families import tokenizer_family
from reap2gguf.tokenizer.gemma import read_gemma
from reap2gguf.tokenizer.llama_gemma import LlamaGemma
from reap2gguf.tokenizer.probe import HARD_CASES
from tests.tokenizer.small import llama_cpp_tokenizer, mixed_text
from tests.tokenizer.small_gemma import BYTES, VOCAB_SIZE, gemma_tokenizer, write_gemma

FAMILY = tokenizer_family("gemma4")


@pytest.mark.parametrize("with_bos", [True, False])
def test_ids_are_those_of_llama_cpp_and_of_the_library(with_bos: bool, tmp_path: Path) -> None:
    description = gemma_tokenizer()
    if not with_bos:
        description["post_processor"] = None
    write_gemma(tmp_path, description=description)
    vocabulary = read_gemma(description, VOCAB_SIZE, tmp_path / "tokenizer.json")
    ours = LlamaGemma(vocabulary.tokens, vocabulary.types, vocabulary.merges)
    library = Library.from_file(str(tmp_path / "tokenizer.json"))
    texts = [*HARD_CASES, mixed_text(seed=6, length=10_000)]
    texts += ["\n" * count for count in (1, 2, 3, 4, 7, 40)] + ["a\n\n\n\nb </s> <s>", "▁▁ ▁"]
    texts += [f"{mixed_text(i, 40)}<eos>{mixed_text(i + 50, 20)}<|tool_call> x" for i in range(20)]
    with llama_cpp_tokenizer(tmp_path, VOCAB_SIZE, FAMILY) as llama:
        for text in texts:
            found = ours.encode(text)
            assert found == llama.encode(text), text
            assert found == library.encode(text, add_special_tokens=False).ids, text
            with_special = llama.encode(text, add_special=True)
            assert with_special == [2, *found], "llama.cpp puts <bos> whatever a header says"
            assert library.encode(text).ids == (with_special if with_bos else found)


def made(texts: list[str], merges: list[tuple[str, str]]) -> LlamaGemma:
    types = [TokenType.NORMAL] * len(texts) + [TokenType.BYTE] * 256
    return LlamaGemma([*texts, *BYTES], types, merges)


def test_the_lowest_rank_is_joined_first_and_then_the_left() -> None:
    ours = made(["a", "b", "ab", "ba", "aa"], [("b", "a"), ("a", "b"), ("a", "a")])
    assert ours.encode("aba") == [0, 3]
    assert ours.encode("aaa") == [4, 0]


def test_a_merge_that_leads_elsewhere_now_is_not_made() -> None:
    ours = made(["a", "b", "ab", "c", "bc"], [("a", "b"), ("b", "c")])
    assert ours.encode("abc") == [2, 3]


def test_characters_that_are_no_tokens_are_bytes() -> None:
    ours = made(["▁", "a", "▁a"], [("▁", "a")])
    assert ours.encode(" a é") == [2, 0, 3 + 0xC3, 3 + 0xA9]
    assert ours.encode("") == []


def test_line_breaks_are_split_off_and_are_one_token_where_there_is_one() -> None:
    ours = made(["a", "\n", "\n\n", "a\n"], [("a", "\n")])
    assert ours.encode("a\n\na") == [0, 2, 0]
    assert ours.encode("a\n\n\na") == [0, 1, 1, 1, 0]
