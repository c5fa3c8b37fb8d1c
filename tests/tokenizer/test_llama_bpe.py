from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFWriter, TokenType
from tokenizers import Tokenizer as Library
from tokenizers import pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from reap2gguf.models.tokenizer_families import (
    DEEPSEEK_LLM_STEPS,
    DEEPSEEK_V3_STEPS,
    KIMI_STEPS,
    O200K_STEPS,
    TEKKEN_STEPS,
    TokenizerFamily,
)
from reap2gguf.tokenizer.llama_bpe import LlamaBpe
from reap2gguf.tokenizer.pre_tokenizers import PRE_TOKENIZERS, is_settled, split_words
from reap2gguf.tokenizer.special_names import SPECIAL_BY_NAME
from reap2gguf.tokenizer.steps import split_patterns
from reap2gguf.tokenizer.vocabulary import read_vocabulary
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
SPLITS_ITSELF = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
DIGITS = {"type": "Digits", "individual_digits": True}
LAST = byte_level(use_regex=False)
# the pre-tokenizers of published tokenizer.json files
STEPS: dict[str, list[dict[str, Any]]] = {
    "qwen2": [split(QWEN2), LAST],
    "qwen35": [split(QWEN35), LAST],
    "llama-bpe": [split(LLAMA3), LAST],
    "glm4": [split(LLAMA3), LAST],
    "lfm2": [split(LLAMA3), LAST],
    "gpt-4o": [*map(split, O200K_STEPS), LAST],
    "deepseek-v3": [*map(split, DEEPSEEK_V3_STEPS), LAST],
    "deepseek-llm": [*map(split, DEEPSEEK_LLM_STEPS[:-1]), DIGITS, LAST],
    "olmo": [SPLITS_ITSELF],
    "refact": [DIGITS, {**SPLITS_ITSELF, "use_regex": True}],
    "kimi-k2": [*map(split, KIMI_STEPS), LAST],
    "minimax-m2": [*map(split, O200K_STEPS), LAST],
    "tekken": [*map(split, TEKKEN_STEPS), LAST],
}


_CASED, _MARKS = ("Lu", "Lt", "Ll"), ("Mn", "Mc", "Me")


def _one_case(text: str) -> str:
    """A text without letters beyond ASCII that have case, and the small letters of the same."""
    return "".join(
        c for c in text if c < "\x80" or unicodedata.category(c) not in (*_CASED, *_MARKS)
    ) + "".join(c for c in text.lower() if unicodedata.category(c) not in (*_CASED[:2], *_MARKS))


# texts in which llama.cpp gives other ids, as its users are told
DIFFERENT: dict[str, Callable[[str], str]] = {
    "gpt-4o": lambda text: (
        "".join(c for c in text if c < "\x80" or unicodedata.category(c) not in (*_CASED, *_MARKS))
        + "".join(c for c in text.lower() if unicodedata.category(c) not in (*_CASED[:2], *_MARKS))
    ),
    "deepseek-llm": lambda text: "".join(
        " " if char.isspace() else char
        for char in text
        if char < "\x80" or not char.isnumeric() or unicodedata.category(char)[0] != "N"
    ),
    "kimi-k2": lambda text: "".join(
        char for char in text.lower() if unicodedata.category(char)[0] != "M"
    ),
    "minimax-m2": _one_case,
    "tekken": _one_case,
}


@cache
def crossing_merges(one_digit: bool) -> tuple[dict[str, int], list[list[str]]]:
    """A vocabulary and merges that join words of any pattern, so that each split changes ids."""
    library = Library(BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = BpeTrainer(
        vocab_size=4093, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    text = mixed_text(seed=2, length=60_000).replace("<|", "")
    if one_digit:
        text = "".join(text[i] for i in range(len(text)) if not text[i - 1 : i + 1].isnumeric())
    library.train_from_iterator([text[i : i + 50] for i in range(0, len(text), 50)], trainer)
    model = json.loads(library.to_str())["model"]
    return model["vocab"], model["merges"]


def of_family(name: str) -> dict[str, Any]:
    """A tokenizer that is split and merged as those of a family are."""
    description = json.loads((EXAMPLE / "tokenizer.json").read_text())
    vocab, merges = crossing_merges(PRE_TOKENIZERS[name].joins is not None)
    description["model"] |= {"vocab": vocab, "merges": merges}
    steps = STEPS[name]
    sequence = {"type": "Sequence", "pretokenizers": steps}
    description["pre_tokenizer"] = sequence if len(steps) > 1 else steps[0]
    description["model"]["ignore_merges"] = PRE_TOKENIZERS[name].ignore_merges
    if PRE_TOKENIZERS[name].adds_bos:
        start = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
        description["post_processor"]["single"].insert(0, start)
        known = {"id": "<|endoftext|>", "ids": [4093], "tokens": ["<|endoftext|>"]}
        description["post_processor"]["special_tokens"] = {"<|endoftext|>": known}
    return description


def family_of(name: str) -> TokenizerFamily:
    """A family whose tokenizers are split in one way, called `name`."""
    return TokenizerFamily({split_patterns(of_family(name)["pre_tokenizer"]): name})


def test_every_pre_tokenizer_is_compared() -> None:
    assert STEPS.keys() == PRE_TOKENIZERS.keys()


@pytest.mark.parametrize("name", STEPS)
def test_ids_are_those_of_llama_cpp_and_of_the_library(name: str, tmp_path: Path) -> None:
    description = of_family(name)
    write(tmp_path, description)
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<|endoftext|>"}')
    text = mixed_text(seed=1, length=20_000)
    if name in DIFFERENT:
        text = DIFFERENT[name](text)
    vocabulary = read_vocabulary(description, 4096, tmp_path)
    ours = LlamaBpe(
        vocabulary.tokens, vocabulary.types, vocabulary.merges, PRE_TOKENIZERS[name]
    ).encode(text)
    library = Library.from_file(str(tmp_path / "tokenizer.json"))
    with llama_cpp_tokenizer(tmp_path, 4096, family_of(name)) as llama:
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
        (["get", "HTTPName's", " it", "123", "4", "!//\n", "x"], "gpt-4o"),
        (["É", "COLE", " aÉbe", "\u0301s"], "gpt-4o"),
        (["get", "HTTPName's", " it", "123", "4", "!//\n", "x"], "minimax-m2"),
        (["É", "COLE", " aÉbe", "\u0301s"], "minimax-m2"),
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
