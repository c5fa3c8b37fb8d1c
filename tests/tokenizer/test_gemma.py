from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFWriter, TokenType

from reap2gguf.errors import CheckpointError, Reap2ggufError, UnsupportedModelError
from reap2gguf.gguf_files.reader import read_gguf_header
from reap2gguf.models.tokenizer_families import tokenizer_family
from reap2gguf.tokenizer.check import check_tokenizer
from reap2gguf.tokenizer.from_gguf import tokenizer_json
from reap2gguf.tokenizer.gemma import read_gemma
from reap2gguf.tokenizer.gguf_keys import add_tokenizer
from reap2gguf.tokenizer.tokenizer import Tokenizer
from tests.tokenizer.small import added
from tests.tokenizer.small_gemma import (
    SHOWN,
    SPECIAL,
    VOCAB_SIZE,
    gemma_tokenizer,
    write_gemma,
)

FAMILY = tokenizer_family("gemma4")
Change = Callable[[dict[str, Any]], Any]


def read(tokenizer: dict[str, Any], vocab_size: int = VOCAB_SIZE) -> Any:
    return read_gemma(tokenizer, vocab_size, Path("here/tokenizer.json"))


def test_types_are_those_of_llama_cpp_s_converter() -> None:
    """tests/models/test_converted.py compares a whole header with the converter's."""
    found = read(gemma_tokenizer())
    types = dict(zip(found.tokens, found.types, strict=True))
    assert {types[text] for text in SPECIAL} == {TokenType.CONTROL}
    assert {types[text] for text in SHOWN} == {TokenType.USER_DEFINED}
    assert types["<0x0A>"] == TokenType.BYTE
    assert types["▁the"] == types["\n"] == types["</s>"] == TokenType.NORMAL


def test_added_tokens_that_are_not_special() -> None:
    """One that merges make is ordinary; llama.cpp finds no other one without a type of its own."""
    tokenizer = gemma_tokenizer()
    ids = tokenizer["model"]["vocab"]
    tokenizer["added_tokens"] += [added(ids[text], text) for text in ("▁the", "</s>")]
    tokenizer["added_tokens"].append(added(VOCAB_SIZE, "<table>"))
    found = read(tokenizer, VOCAB_SIZE + 2)
    types = dict(zip(found.tokens, found.types, strict=True))
    assert types["▁the"] == TokenType.NORMAL
    assert types["<table>"] == TokenType.USER_DEFINED
    assert found.tokens[-1] == f"[PAD{VOCAB_SIZE + 1}]"
    assert found.types[-1] == TokenType.UNUSED


def add_merge(left: str, right: str) -> Change:
    def change(tokenizer: dict[str, Any]) -> None:
        vocab = tokenizer["model"]["vocab"]
        for text in (left, right, left + right):
            vocab.setdefault(text, len(vocab))
        tokenizer["model"]["merges"].append([left, right])

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.update(normalizer=None), "normalizer is"),
        (lambda t: t.update(normalizer={"type": "NFC"}), "normalizer is"),
        (lambda t: t["pre_tokenizer"].update(behavior="Isolated"), "behavior is 'Isolated'"),
        (lambda t: t["pre_tokenizer"].update(pattern={"Regex": " "}), "pattern is"),
        (lambda t: t["model"].update(ignore_merges=True), "ignore_merges is"),
        (lambda t: t["model"].update(merges=[]), "no merges"),
        (add_merge("a", "\n"), "line breaks with line breaks"),
        (add_merge(" ", "a"), "expected no spaces"),
        (lambda t: t["model"]["merges"].append(t["model"]["merges"][0]), "each pair once"),
        (lambda t: t["model"]["merges"].append(["q", "qqq"]), "not in the vocabulary"),
        (lambda t: t["model"]["vocab"].pop("<0x41>"), "no token <0x41>"),
        (lambda t: t["model"]["vocab"].update({"zz": 3}), "have the same id 3"),
        (lambda t: t["added_tokens"][0].update(id=9), "has the id 9"),
        (lambda t: t["added_tokens"].append(added(7, "new")), "has the id 7"),
        (lambda t: t["model"]["vocab"].update({"<|im_end|>": 500}), "same id 500"),
        (lambda t: t["model"]["vocab"].update({"far": 10**6}), "below the config's vocab_size"),
    ],
)
def test_what_llama_cpp_does_not_reproduce_is_refused(change: Change, words: str) -> None:
    tokenizer = gemma_tokenizer()
    read(tokenizer)
    change(tokenizer)
    with pytest.raises(Reap2ggufError, match=words):
        read(tokenizer, VOCAB_SIZE + 8)


def test_an_ordinary_token_that_llama_cpp_takes_for_a_special_one() -> None:
    tokenizer = gemma_tokenizer()
    tokenizer["model"]["vocab"]["<|im_end|>"] = VOCAB_SIZE
    with pytest.raises(UnsupportedModelError, match="a special one for llama"):
        read(tokenizer, VOCAB_SIZE + 1)


def test_a_vocabulary_that_is_too_large(tmp_path: Path) -> None:
    folder = written(write_gemma(tmp_path))
    with pytest.raises(UnsupportedModelError, match="is over"):
        check_tokenizer(folder, 2**21, FAMILY)


def written(folder: Path) -> Path:
    (folder / "config.json").write_text(json.dumps({"model_type": "gemma4", "eos_token_id": 1}))
    return folder


def test_it_is_checked_and_read_back(tmp_path: Path) -> None:
    folder = written(write_gemma(tmp_path / "tokenizer"))
    assert not check_tokenizer(folder, VOCAB_SIZE, FAMILY)
    path = tmp_path / "vocabulary.gguf"
    writer = GGUFWriter(path, "gemma4")
    add_tokenizer(writer, folder, VOCAB_SIZE, FAMILY)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    again = tokenizer_json(read_gguf_header(path))
    expected = gemma_tokenizer()
    assert again["model"]["vocab"] == expected["model"]["vocab"]
    assert again["model"]["merges"] == expected["model"]["merges"]
    other = tmp_path / "again"
    write_gemma(other, description=again)
    text = "the def of\n\n\n\n  é ß <|tool_call> 你"
    assert Tokenizer(other).encode(text).tolist() == Tokenizer(folder).encode(text).tolist()
    assert Tokenizer(other).bos == Tokenizer(folder).bos == 2


def test_a_file_without_a_first_token(tmp_path: Path) -> None:
    folder = written(
        write_gemma(tmp_path, description=gemma_tokenizer() | {"post_processor": None})
    )
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"bos_token": None}))
    with pytest.raises(CheckpointError, match="no bos_token among the added tokens"):
        check_tokenizer(folder, VOCAB_SIZE, FAMILY)
