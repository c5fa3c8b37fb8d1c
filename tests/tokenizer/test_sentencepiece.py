"""SentencePiece tokenizers in a header: what llama.cpp's converter writes, and what is refused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFWriter, TokenType

from reap2gguf.errors import CheckpointError, UnsupportedModelError
from reap2gguf.models.tokenizer_families import tokenizer_family
from reap2gguf.tokenizer.character_bpe import is_sentencepiece
from reap2gguf.tokenizer.check import check_tokenizer
from reap2gguf.tokenizer.gguf_keys import add_tokenizer
from reap2gguf.tokenizer.sentencepiece import read_spm
from reap2gguf.tokenizer.tokenizer import Tokenizer
from tests.tiny import REPOSITORY
from tests.tokenizer.small import added, llama_cpp_tokenizer, tokenizer
from tests.tokenizer.small_spm import (
    CONFIG,
    VOCAB_SIZE,
    piece_model,
    scores,
    spm_tokenizer,
    write_spm,
)

FAMILY = tokenizer_family("mixtral")
EXPECTED = json.loads((REPOSITORY / "tests" / "data" / "spm-keys.json").read_text())
METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": False}


def keys_of(folder: Path) -> dict[str, Any]:
    """The keys of the header, long lists as their SHA-256."""
    writer = GGUFWriter(None, "llama")
    add_tokenizer(writer, folder, VOCAB_SIZE, FAMILY)
    return {key: short(entry.value) for key, entry in writer.kv_data[0].items() if "token" in key}


def short(value: Any) -> Any:
    if not isinstance(value, list):
        return value
    plain = [one.decode() if isinstance(one, bytes) else one for one in value]
    plain = [one if isinstance(one, (str, float)) else int(one) for one in plain]
    return hashlib.sha256(json.dumps(plain).encode()).hexdigest()


@pytest.mark.parametrize("name", EXPECTED)
def test_keys_are_those_of_the_converter(name: str, tmp_path: Path) -> None:
    write_spm(tmp_path, config=CASES[name])
    assert keys_of(tmp_path) == EXPECTED[name]


# tokenizer_config.json, where it is another than usual; recorded from llama.cpp at 0c1e570
CASES: dict[str, dict[str, Any]] = {
    "as published": {},
    "says the space": {"add_prefix_space": True},
    "names no tokens": {"added_tokens_decoder": None},
}


def test_without_a_model_scores_are_the_order_of_the_merges(tmp_path: Path) -> None:
    write_spm(tmp_path, model=None, config={"added_tokens_decoder": None})
    found = read_spm(spm_tokenizer(), tmp_path, {}, VOCAB_SIZE)
    made = [text for text in scores() if len(text) > 1]
    by_score = sorted(made, key=lambda text: -found.scores[found.tokens.index(text)])
    known = [text for text in by_score if not text.startswith("qz")]
    assert known == sorted(known, key=lambda text: -scores()[text])
    assert found.types[:4] == [
        TokenType.UNKNOWN,
        TokenType.CONTROL,
        TokenType.CONTROL,
        TokenType.BYTE,
    ]
    assert set(found.types[259:-2]) == {TokenType.NORMAL}
    assert found.tokens[-2:] == [f"[PAD{VOCAB_SIZE - 2}]", f"[PAD{VOCAB_SIZE - 1}]"]


def test_more_tokens(tmp_path: Path) -> None:
    description = spm_tokenizer()
    new = [added(VOCAB_SIZE - 2, "<|im_end|>", True), added(VOCAB_SIZE - 1, "<tool▁call>")]
    description["added_tokens"] += new
    write_spm(tmp_path, description, config={"added_tokens_decoder": None})
    found = read_spm(description, tmp_path, {}, VOCAB_SIZE)
    assert found.tokens[-2:] == ["<|im_end|>", "<tool call>"]
    assert found.types[-2:] == [TokenType.CONTROL, TokenType.USER_DEFINED]
    assert found.scores[-2:] == [-1000.0, -1000.0]


def test_calibration_has_the_ids_of_llama_cpp(tmp_path: Path) -> None:
    write_spm(tmp_path)
    assert check_tokenizer(tmp_path, VOCAB_SIZE, FAMILY) == ()
    mine = Tokenizer(tmp_path)
    assert mine.bos == 1
    text = "It's  a test</s>\n[INST] Übergröße 好 [/INST]"
    with llama_cpp_tokenizer(tmp_path, VOCAB_SIZE, FAMILY) as llama:
        assert [1, *mine.encode(text)] == llama.encode(text, add_special=True)
        assert llama.ends_at(2)


@pytest.mark.parametrize(
    ("scheme", "words"),
    [
        ("always", ["has one space more there"]),
        ("first", ["after a special token", "has one space more there"]),
    ],
)
def test_spaces_that_llama_cpp_puts_alone_are_told(
    scheme: str, words: list[str], tmp_path: Path
) -> None:
    description = spm_tokenizer() | {"normalizer": None}
    description["pre_tokenizer"] = METASPACE | {"prepend_scheme": scheme}
    write_spm(tmp_path, description)
    caveats = check_tokenizer(tmp_path, VOCAB_SIZE, FAMILY)
    assert len(caveats) == len(words)
    assert all(word in caveat for word, caveat in zip(words, caveats, strict=True))


@pytest.mark.parametrize("says", [False, None])
@pytest.mark.parametrize("form", ["metaspace", "normalizer"])
def test_no_space_before_a_text(form: str, says: bool | None, tmp_path: Path) -> None:
    """Also where tokenizer_config.json does not say it, and llama.cpp would put one."""
    description = spm_tokenizer()
    if form == "metaspace":
        description |= {
            "normalizer": None,
            "pre_tokenizer": METASPACE | {"prepend_scheme": "never"},
        }
    else:
        del description["normalizer"]["normalizers"][0]
    config = {"add_prefix_space": says}
    write_spm(tmp_path, description, piece_model(adds_space=False), config)
    assert check_tokenizer(tmp_path, VOCAB_SIZE, FAMILY) == ()
    mine = Tokenizer(tmp_path)
    with llama_cpp_tokenizer(tmp_path, VOCAB_SIZE, FAMILY) as llama:
        assert mine.encode("the a").tolist() == llama.encode("the a")


def replaced(*path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(description: dict[str, Any]) -> None:
        *before, last = path
        part = description
        for key in before:
            part = part[key]
        part[last] = value

    return change


def no_byte(description: dict[str, Any]) -> None:
    vocab = description["model"]["vocab"]
    vocab["<0xzz>"] = vocab.pop("<0x41>")


def other_text(description: dict[str, Any]) -> None:
    vocab = description["model"]["vocab"]
    vocab["qq"] = vocab.pop("qz9")


def unknown_merge(description: dict[str, Any]) -> None:
    description["model"]["merges"].append(["q", "zqzq"])


def special_by_name(description: dict[str, Any]) -> None:
    vocab = description["model"]["vocab"]
    vocab["<PRE>"] = vocab.pop("qz9")


@pytest.mark.parametrize(
    ("change", "model", "words"),
    [
        (replaced("model", "dropout", value=0.1), None, "model.dropout is 0.1"),
        (replaced("model", "ignore_merges", value=True), None, "ignore_merges is True"),
        (replaced("normalizer", value={"type": "NFKC"}), None, "normalizer is {'type': 'NFKC'}"),
        (replaced("pre_tokenizer", value=METASPACE), None, "expected none beside a normalizer"),
        (replaced("normalizer", value=None), None, "pre_tokenizer is None, expected Metaspace"),
        (replaced("model", "vocab", value={}), None, "no vocabulary"),
        (replaced("model", "vocab", "x", value=VOCAB_SIZE), None, "expected one below the"),
        (no_byte, None, "no token <0x41>, expected one for each"),
        (unknown_merge, None, "'zqzq' is not in the vocabulary"),
        (special_by_name, None, "'<PRE>' with the id"),
        (other_text, b"", "by tokenizer.model and 'qq' by tokenizer.json"),
        (lambda description: None, piece_model(model_type=1), "no BPE, normalizes by 'identity'"),
        (lambda description: None, piece_model(normalizer="nmt_nfkc"), "by 'nmt_nfkc', expected"),
        (lambda description: None, piece_model(removes_spaces=True), "and leaves out spaces"),
        (lambda description: None, piece_model(adds_space=False), "puts no space before a text"),
        (lambda description: None, b"x", "no SentencePiece model"),
    ],
)
def test_what_llama_cpp_reads_otherwise_is_refused(
    change: Callable[[dict[str, Any]], None], model: bytes | None, words: str, tmp_path: Path
) -> None:
    description = spm_tokenizer()
    change(description)
    write_spm(tmp_path, description, model)
    with pytest.raises((CheckpointError, UnsupportedModelError)) as raised:
        check_tokenizer(tmp_path, VOCAB_SIZE, FAMILY)
    assert words in str(raised.value)
    assert str(tmp_path) in str(raised.value)


def test_other_merges_than_the_scores_are_found(tmp_path: Path) -> None:
    description = spm_tokenizer()
    description["model"]["merges"].reverse()
    write_spm(tmp_path, description)
    with pytest.raises(UnsupportedModelError, match="would tokenize"):
        check_tokenizer(tmp_path, VOCAB_SIZE, FAMILY)


def test_other_families_have_no_such_tokenizer(tmp_path: Path) -> None:
    write_spm(tmp_path)
    with pytest.raises(UnsupportedModelError, match="splits text by no pattern"):
        check_tokenizer(tmp_path, VOCAB_SIZE, tokenizer_family("qwen3_moe"))
    assert is_sentencepiece(spm_tokenizer())
    assert not is_sentencepiece(tokenizer())
    assert not is_sentencepiece({"model": None})
    assert CONFIG["legacy"]
