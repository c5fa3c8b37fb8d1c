from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFWriter, TokenType
from tokenizers import Tokenizer as Library

from reap2gguf.tokenizer.llama_bpe import LlamaBpe
from reap2gguf.tokenizer.pre_tokenizers import PRE_TOKENIZERS, is_settled, split_words
from reap2gguf.tokenizer.vocabulary import SPECIAL_BY_NAME, byte_symbols, read_vocabulary
from tests.tiny import EXAMPLE
from tests.tokenizer.small import (
    QWEN2,
    QWEN35,
    byte_level,
    llama_cpp_tokenizer,
    loaded_by_llama_cpp,
    mixed_text,
    split,
    write,
)

LLAMA3 = QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|", 1)
_DEEPSEEK3_WORDS = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK3 = (r"\p{N}{1,3}", "[一-龥\u3040-ゟ゠-ヿ]+", _DEEPSEEK3_WORDS)
PATTERNS = {
    "qwen2": (QWEN2,),
    "qwen35": (QWEN35,),
    "llama-bpe": (LLAMA3,),
    "glm4": (LLAMA3,),
    "deepseek-v3": DEEPSEEK3,
}


def of_family(name: str) -> dict[str, Any]:
    """The example's tokenizer, split and merged as those of a family are."""
    description = json.loads((EXAMPLE / "tokenizer.json").read_text())
    steps = [*map(split, PATTERNS[name]), byte_level(use_regex=False)]
    description["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
    description["model"]["ignore_merges"] = PRE_TOKENIZERS[name].ignore_merges
    if PRE_TOKENIZERS[name].adds_bos:
        start = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
        description["post_processor"]["single"].insert(0, start)
        known = {"id": "<|endoftext|>", "ids": [4093], "tokens": ["<|endoftext|>"]}
        description["post_processor"]["special_tokens"] = {"<|endoftext|>": known}
    return description


def test_every_pre_tokenizer_is_compared() -> None:
    assert PATTERNS.keys() == PRE_TOKENIZERS.keys()


@pytest.mark.parametrize("name", PATTERNS)
def test_ids_are_those_of_llama_cpp_and_of_the_library(name: str, tmp_path: Path) -> None:
    description = of_family(name)
    write(tmp_path, description)
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<|endoftext|>"}')
    text = mixed_text(seed=1, length=20_000)
    vocabulary = read_vocabulary(description, 4096, tmp_path)
    ours = LlamaBpe(
        vocabulary.tokens, vocabulary.types, vocabulary.merges, PRE_TOKENIZERS[name]
    ).encode(text)
    library = Library.from_file(str(tmp_path / "tokenizer.json"))
    with llama_cpp_tokenizer(tmp_path, 4096, {PATTERNS[name]: name}) as llama:
        assert ours == llama.encode(text)
        assert library.encode(text).ids == llama.encode(text, add_special=True)
    assert ours == library.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["It", "'S", " a", "  ", " test", "\r\n", "x", "1", "2", "!?\n\n"], "qwen2"),
        (["a", "\u0301b", " \u0301"], "qwen2"),
        (["a\u0301b", " \u0301"], "qwen35"),
        (["123", "45", " ", "678"], "llama-bpe"),
        (["中文", "abc", "123", "4"], "deepseek-v3"),
    ],
)
def test_words(words: list[str], name: str) -> None:
    assert split_words("".join(words), PRE_TOKENIZERS[name].splits) == words


def test_no_text_has_no_words_and_no_ids() -> None:
    assert split_words("", PRE_TOKENIZERS["qwen2"].splits) == []
    assert LlamaBpe(["a"], [TokenType.NORMAL], [], PRE_TOKENIZERS["qwen2"]).encode("") == []


def test_characters_of_one_class_in_all_versions_are_settled() -> None:
    assert is_settled("aé中 \n\u0301\ue000\x00")
    assert not is_settled("\U00010d4a")  # a letter that Unicode 16 added
    assert not is_settled("\u0378")  # not assigned yet
    assert not is_settled("\u017f")  # an s without case, or a letter


def test_a_longer_special_token_takes_its_text_first() -> None:
    tokens = ["a", "<|a|>", "|><|", "<|a|><|b"]
    types = [TokenType.NORMAL] + [TokenType.CONTROL] * 3
    ours = LlamaBpe(tokens, types, [], PRE_TOKENIZERS["qwen2"])
    assert ours.encode("<|a|><|b<|a|><|a|>a") == [3, 1, 1, 0]


def test_of_two_equal_pairs_the_left_one_is_merged_first() -> None:
    ours = LlamaBpe(["a", "aa"], [TokenType.NORMAL] * 2, [("a", "a")], PRE_TOKENIZERS["qwen2"])
    assert ours.encode("aaaaa") == [1, 1, 0]


def test_bytes_have_256_symbols() -> None:
    assert len(set(byte_symbols())) == 256
    assert not any(symbol.isspace() for symbol in byte_symbols())


def test_names_of_special_tokens_are_those_of_llama_cpp(tmp_path: Path) -> None:
    """Each is a special token for llama.cpp though the header says that it is an ordinary one."""
    ordinary = []
    for name in sorted(SPECIAL_BY_NAME):
        writer = GGUFWriter(tmp_path / "x.gguf", "qwen3moe")
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("qwen2")
        writer.add_token_list(["a", "b", "ab", name])
        writer.add_token_types([TokenType.NORMAL] * 4)
        writer.add_token_merges(["a b"])
        with loaded_by_llama_cpp(writer, tmp_path / "x.gguf") as llama:
            if llama.encode(f"a{name}b") != [0, 3, 1]:
                ordinary.append(name)
    assert ordinary == []
