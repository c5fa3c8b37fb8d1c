from __future__ import annotations

from pathlib import Path

import pytest
from gguf import TokenType
from tokenizers import Tokenizer as Library

from reap2gguf.models.tokenizer_families import tokenizer_family
from reap2gguf.tokenizer.llama_spm import LlamaSpm
from reap2gguf.tokenizer.probe import HARD_CASES
from reap2gguf.tokenizer.sentencepiece import read_spm
from tests.tokenizer.small import llama_cpp_tokenizer, mixed_text
from tests.tokenizer.small_spm import CONFIG, VOCAB_SIZE, spm_tokenizer, write_spm

FAMILY = tokenizer_family("mixtral")


@pytest.mark.parametrize("with_model", [True, False])
def test_ids_are_those_of_llama_cpp_and_of_the_library(with_model: bool, tmp_path: Path) -> None:
    write_spm(tmp_path, model=b"" if with_model else None)
    vocabulary = read_spm(spm_tokenizer(), tmp_path, CONFIG, VOCAB_SIZE)
    ours = LlamaSpm(vocabulary.tokens, vocabulary.types, vocabulary.scores, space_prefix=True)
    library = Library.from_file(str(tmp_path / "tokenizer.json"))
    texts = [*HARD_CASES, mixed_text(seed=6, length=10_000)]
    texts += [f"{mixed_text(i, 40)}</s>{mixed_text(i + 50, 20)}<s> x <unk>" for i in range(20)]
    with llama_cpp_tokenizer(tmp_path, VOCAB_SIZE, FAMILY) as llama:
        for text in texts:
            found = ours.encode(text)
            assert found == llama.encode(text), text
            assert found == library.encode(text, add_special_tokens=False).ids, text
            assert library.encode(text).ids == llama.encode(text, add_special=True), text


def made(scores: dict[str, float], prefix: bool = False) -> LlamaSpm:
    tokens = [*scores, *(f"<0x{byte:02X}>" for byte in range(256))]
    types = [TokenType.NORMAL] * len(scores) + [TokenType.BYTE] * 256
    return LlamaSpm(tokens, types, [*scores.values(), *[0.0] * 256], prefix)


def test_the_best_score_is_joined_first_and_then_the_left() -> None:
    ours = made({"a": 0, "b": 0, "ab": -2, "ba": -1, "aa": -3})
    assert ours.encode("aba") == [0, 3]
    assert ours.encode("aaa") == [4, 0]


def test_characters_that_are_no_tokens_are_bytes() -> None:
    ours = made({"▁": 0, "a": 0, "▁a": -1}, prefix=True)
    assert ours.encode("a é") == [2, 0, 3 + 0xC3, 3 + 0xA9]
    assert ours.encode("") == []
