"""A tokenizer of ranks: its merges, its ids, and what llama.cpp's converter writes of it."""

from __future__ import annotations

import base64
import json
import re
import unicodedata
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFWriter
from tokenizers import Tokenizer as Library

from reap2gguf.errors import CheckpointError, UnsupportedModelError
from reap2gguf.models.tokenizer_families import tokenizer_family
from reap2gguf.tokenizer.caveats import RANKS_CAVEAT
from reap2gguf.tokenizer.check import check_tokenizer
from reap2gguf.tokenizer.gguf_keys import add_tokenizer, header_value
from reap2gguf.tokenizer.in_transformers import load_in_transformers
from reap2gguf.tokenizer.probe import HARD_CASES
from reap2gguf.tokenizer.ranks import merges_of_ranks, tokenizer_of_ranks
from reap2gguf.tokenizer.tokenizer import Tokenizer
from reap2gguf.tokenizer.tokenizer_files import load_library, read_tokenizer_json, special_tokens
from tests.tiny import REPOSITORY
from tests.tokenizer.small import llama_cpp_tokenizer, mixed_text
from tests.tokenizer.small_ranks import N_RANKS, NAMED, VOCAB_SIZE, rank_lines, tokens, write_ranks
from tests.tokenizer.test_sentencepiece import short

FAMILY = tokenizer_family("deepseek_v3")
RANKS = {token: rank for rank, token in enumerate(tokens())}
WHERE = Path("m/tiktoken.model")


def merged_by_rank(word: bytes) -> list[int]:
    """The ids of a word, as tiktoken is described: the neighbours of the lowest rank are joined."""
    parts = [word] if word in RANKS else [bytes([byte]) for byte in word]
    while True:
        joined = [(RANKS.get(a + b, N_RANKS), at) for at, (a, b) in enumerate(pairwise(parts))]
        rank, at = min(joined, default=(N_RANKS, 0))
        if rank == N_RANKS:
            return [RANKS[part] for part in parts]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


def test_the_ids_are_those_of_the_ranks(tmp_path: Path) -> None:
    library = load_library(write_ranks(tmp_path))
    splitter = library.pre_tokenizer
    assert splitter is not None
    bytes_of = {symbol: byte for byte, symbol in enumerate(library_symbols())}
    for text in [*HARD_CASES, mixed_text(seed=9, length=5_000).replace("<|", "")]:
        words = [word for word, _ in splitter.pre_tokenize_str(text)]
        expected = [i for w in words for i in merged_by_rank(bytes(bytes_of[c] for c in w))]
        assert library.encode(text).ids == expected


def library_symbols() -> list[str]:
    from reap2gguf.tokenizer.byte_symbols import byte_symbols

    return list(byte_symbols())


def test_a_token_of_three_parts_has_no_merge() -> None:
    ranks = {b"a": 0, b"b": 1, b"c": 2, b"abc": 3, b"ab": 4, b"abab": 5}
    assert merges_of_ranks(ranks) == [(b"a", b"b"), (b"ab", b"ab")]


def test_keys_are_those_of_the_converter(tmp_path: Path) -> None:
    expected = json.loads((REPOSITORY / "tests" / "data" / "ranks-keys.json").read_text())
    write_ranks(tmp_path)
    writer = GGUFWriter(None, "deepseek2")
    add_tokenizer(writer, tmp_path, VOCAB_SIZE, FAMILY)
    keys = {key: short(entry.value) for key, entry in writer.kv_data[0].items() if "token" in key}
    assert keys == expected


def test_kimi_linear_ends_as_its_tokenizer_says(tmp_path: Path) -> None:
    """llama.cpp's converter takes the tokenizer's end there, and config.json's elsewhere."""
    write_ranks(tmp_path, config={"eos_token": "<|im_end|>"})
    ends = {}
    for model_type in ("deepseek_v3", "kimi_linear"):
        writer = GGUFWriter(None, "deepseek2")
        add_tokenizer(writer, tmp_path, VOCAB_SIZE, tokenizer_family(model_type))
        ends[model_type] = header_value(writer, "tokenizer.ggml.eos_token_id")
    assert ends == {"deepseek_v3": N_RANKS + 1, "kimi_linear": N_RANKS + 2}
    write_ranks(tmp_path, config={"eos_token": "<end>"})
    with pytest.raises(CheckpointError, match="eos_token is '<end>', expected one of the special"):
        add_tokenizer(writer, tmp_path, VOCAB_SIZE, tokenizer_family("kimi_linear"))


def test_ids_are_those_of_llama_cpp_where_it_splits_alike(tmp_path: Path) -> None:
    write_ranks(tmp_path)
    mine = Tokenizer(tmp_path)
    assert mine.bos is None
    text = mixed_text(seed=10, length=10_000).lower()
    text = "".join(char for char in text if unicodedata.category(char)[0] != "M")
    text += "<|im_user|>and 世界<|im_middle|><|reserved_token_2004|>"
    with llama_cpp_tokenizer(tmp_path, VOCAB_SIZE, FAMILY) as llama:
        assert mine.encode(text).tolist() == llama.encode(text, add_special=True)
        assert llama.ends_at(N_RANKS + 1)
        camel = next(token.decode() for token in tokens() if re.fullmatch(b"[a-z]+[A-Z]+", token))
        assert llama.encode(camel) == [RANKS[camel.encode()]]
        assert len(mine.encode(camel)) == 2
    assert mine.decode(mine.encode(text).tolist()) == text


def test_what_a_user_is_told(tmp_path: Path) -> None:
    splitting, ranks = check_tokenizer(write_ranks(tmp_path), VOCAB_SIZE, FAMILY)
    assert "such as camelCase" in splitting
    assert ranks == RANKS_CAVEAT


def test_tokens_that_llama_cpp_never_makes_are_counted(tmp_path: Path) -> None:
    data = rank_lines(b"xqzjk", b"wvxqz")
    write_ranks(tmp_path, data)
    mine = Tokenizer(tmp_path)
    assert mine.encode("xqzjk").tolist() == [N_RANKS]
    _, unreached, _ = check_tokenizer(tmp_path, VOCAB_SIZE + 2, FAMILY)
    assert "no merge leads to 2 tokens" in unreached
    with llama_cpp_tokenizer(tmp_path, VOCAB_SIZE + 2, FAMILY) as llama:
        assert len(llama.encode("xqzjk")) > 1


def test_a_chat_is_written_by_the_template_of_the_files(tmp_path: Path) -> None:
    mine = Tokenizer(write_ranks(tmp_path))
    try:
        assert mine.render_chat([{"role": "user", "content": "hi"}]) == "<|im_user|>hi[EOS]"
    finally:
        mine.close()


def test_transformers_has_the_special_tokens(tmp_path: Path) -> None:
    found = load_in_transformers(write_ranks(tmp_path))
    assert (found.bos_token, found.eos_token_id) == ("[BOS]", N_RANKS + 1)
    text = "It's camelCase<|im_user|> 世界"
    assert found.encode(text) == Tokenizer(tmp_path).encode(text).tolist()


def test_special_tokens_are_named_or_reserved(tmp_path: Path) -> None:
    found = special_tokens(write_ranks(tmp_path))
    assert len(found) == VOCAB_SIZE - N_RANKS
    assert {index: found[index] for index in NAMED} == NAMED
    assert found[N_RANKS + 4] == f"<|reserved_token_{N_RANKS + 4}|>"


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({}, 258),
        ({"vocab_size": N_RANKS + 300}, 258),
        ({"vocab_size": N_RANKS - 1}, 0),
        ({"text_config": {"vocab_size": N_RANKS + 9}}, 9),
    ],
)
def test_as_many_special_tokens_as_the_model_has_ids(
    sizes: dict[str, Any], expected: int, tmp_path: Path
) -> None:
    write_ranks(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    assert len(special_tokens(tmp_path)) == expected


def test_a_tokenizer_json_comes_first(tmp_path: Path) -> None:
    write_ranks(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"own": true}')
    assert read_tokenizer_json(tmp_path) == {"own": True}


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"YQ== 1\n", "line 1 is 'YQ== 1' (expected a new token and the rank 0)"),
        (b"YQ== 0\nYQ== 1\n", "line 2 is 'YQ== 1' (expected a new token and the rank 1)"),
        (b"YQ\n", "line 1 is 'YQ'"),
        (b"* 0\n", "line 1 is '* 0'"),
        (b"YQ== x\n", "line 1 is 'YQ== x'"),
        (b" 0\n", "expected a new token"),
        (base64.b64encode(b"a" * 1025) + b" 0", "expected a new token"),
        (b"YQ== 0\n", "no token for the byte 0x00"),
        (b"", "no token for the byte 0x00"),
    ],
)
def test_what_is_no_file_of_ranks_is_refused(data: bytes, words: str) -> None:
    with pytest.raises(CheckpointError) as raised:
        tokenizer_of_ranks(data, {}, 1, WHERE)
    assert str(raised.value).startswith(f"{WHERE}: ")
    assert words in str(raised.value)


@pytest.mark.parametrize(
    ("config", "error", "words"),
    [
        ({"tokenizer_class": "Other"}, UnsupportedModelError, "is 'Other' beside tiktoken.model"),
        ({"added_tokens_decoder": None}, CheckpointError, "added_tokens_decoder is None"),
        ({"added_tokens_decoder": {"x": {"content": "a"}}}, CheckpointError, "expected texts by"),
        ({"added_tokens_decoder": {"1": {}}}, CheckpointError, "expected texts by id"),
    ],
)
def test_files_beside_the_ranks(
    config: dict[str, Any], error: type[Exception], words: str, tmp_path: Path
) -> None:
    with pytest.raises(error) as raised:
        read_tokenizer_json(write_ranks(tmp_path, config=config))
    assert words in str(raised.value)


def test_other_families_have_no_ranks(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="none of the patterns known here"):
        check_tokenizer(write_ranks(tmp_path), VOCAB_SIZE, tokenizer_family("qwen3_moe"))


def test_the_library_reads_what_is_made(tmp_path: Path) -> None:
    made = tokenizer_of_ranks(rank_lines(), NAMED, 12, WHERE)
    assert Library.from_str(json.dumps(made)).get_vocab_size() == VOCAB_SIZE
