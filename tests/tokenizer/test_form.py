from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from reap2gguf.errors import CheckpointError, UnsupportedModelError
from reap2gguf.models.tokenizer_families import QWEN
from reap2gguf.tokenizer.form import check_form
from reap2gguf.tokenizer.post_processor import added_by_post_processor
from tests.tokenizer.small import QWEN2, byte_level, split, tokenizer

WHERE = Path("m/tokenizer.json")
TEXT = {"Sequence": {"id": "A", "type_id": 0}}
NOTHING_ADDED = {"type": "TemplateProcessing", "single": [TEXT], "special_tokens": {}}


def check(**parts: Any) -> str:
    added_by_post_processor(tokenizer() | parts, WHERE)
    return check_form(tokenizer() | parts, WHERE, QWEN.pre_tokenizers)


def steps(*found: Any) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(found)}


LAST = byte_level(use_regex=False)


@pytest.mark.parametrize(
    "parts",
    [
        {},
        {"normalizer": None},
        {"normalizer": {"type": "Sequence", "normalizers": []}},
        {"post_processor": byte_level()},
        {"post_processor": NOTHING_ADDED},
        {"post_processor": {"type": "Sequence", "processors": [byte_level(), NOTHING_ADDED]}},
        {"decoder": byte_level(use_regex=False)},
        {"pre_tokenizer": steps(split(QWEN2), LAST | {"trim_offsets": False})},
        {"truncation": {"max_length": 5}, "padding": {"pad_id": 1}},
    ],
)
def test_known_forms(parts: dict[str, Any]) -> None:
    assert check(**parts) == "qwen2"


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"normalizer": {"type": "NFKC"}}, "normalizer is {'type': 'NFKC'}, expected none or NFC"),
        ({"pre_tokenizer": split(QWEN2)}, "pre_tokenizer is 'Split', expected ByteLevel"),
        ({"pre_tokenizer": steps(split(QWEN2))}, "pre_tokenizer is 'Split', expected ByteLevel"),
        ({"pre_tokenizer": steps(LAST)}, "splits text by no pattern"),
        ({"pre_tokenizer": steps(split(QWEN2) | {"behavior": "Removed"}, LAST)},
         "pretokenizers[0].behavior is 'Removed', expected 'Isolated'"),
        ({"pre_tokenizer": steps(split(QWEN2) | {"invert": True}, LAST)},
         "pretokenizers[0].invert is True, expected False"),
        ({"pre_tokenizer": steps(split(QWEN2) | {"new": 1}, LAST)},
         "pretokenizers[0].new is 1, expected no such setting"),
        ({"pre_tokenizer": steps(split(QWEN2), LAST | {"add_prefix_space": True})},
         "pretokenizers[1].add_prefix_space is True, expected False"),
        ({"pre_tokenizer": steps(split(QWEN2), byte_level())},
         "pretokenizers[1].use_regex is True, expected False"),
        ({"pre_tokenizer": steps(split(QWEN2), {"type": "Punctuation"}, LAST)},
         "pretokenizers[1] is 'Punctuation', expected Split"),
        ({"pre_tokenizer": steps(steps(split(QWEN2)), split(QWEN2), LAST)},
         "pretokenizers[0] is 'Sequence', expected Split"),
        ({"pre_tokenizer": steps(split(QWEN2), 5, LAST)}, "pretokenizers[1] is 5, expected Split"),
        ({"decoder": None}, "decoder is None, expected ByteLevel"),
        ({"decoder": {"type": "Fuse"}}, "decoder is 'Fuse', expected ByteLevel"),
        ({"post_processor": {"type": "BertProcessing"}}, "post_processor is {"),
        ({"post_processor": {"type": "Sequence", "processors": [byte_level(), "x"]}},
         "post_processor.processors[1] is {"),
    ],
)  # fmt: skip
def test_another_form_is_refused_by_name(parts: dict[str, Any], words: str) -> None:
    with pytest.raises(UnsupportedModelError) as raised:
        check(**parts)
    assert f"{WHERE}: " in str(raised.value)
    assert words in str(raised.value)
    assert str(raised.value).endswith(
        "use the tokenizer.json of the model that this one was made from"
    )


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("ignore_merges", "yes"), ("byte_fallback", True), ("unk_token", "<unk>"), ("dropout", 0.1),
        ("dropout", False), ("continuing_subword_prefix", "##"), ("end_of_word_suffix", "</w>"),
        ("fuse_unk", "yes"), ("cache_capacity", 5),
    ],
)  # fmt: skip
def test_flags_of_the_model_are_compared(setting: str, value: Any) -> None:
    description = tokenizer()
    description["model"][setting] = value
    with pytest.raises(UnsupportedModelError, match=rf"model\.{setting} is .*, expected"):
        check_form(description, WHERE, QWEN.pre_tokenizers)


def test_words_that_are_tokens_may_be_merged_or_not_where_that_is_the_same() -> None:
    description = tokenizer()
    description["model"]["ignore_merges"] = True
    assert check_form(description, WHERE, QWEN.pre_tokenizers) == "qwen2"
    description["model"]["vocab"]["aba"] = 300
    message = r"ignore_merges is True, expected False, as the merges do not lead to the token 'aba'"
    with pytest.raises(UnsupportedModelError, match=message):
        check_form(description, WHERE, QWEN.pre_tokenizers)
    del description["model"]["merges"]
    with pytest.raises(CheckpointError, match="no usable tokenizer"):
        check_form(description, WHERE, QWEN.pre_tokenizers)


def test_older_files_leave_flags_out() -> None:
    description = tokenizer()
    for setting in ("ignore_merges", "byte_fallback", "fuse_unk", "dropout", "unk_token"):
        del description["model"][setting]
    assert check_form(description, WHERE, QWEN.pre_tokenizers) == "qwen2"


def test_a_family_whose_splitting_is_not_known_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"pre-tokenizer new splits .* one of qwen2, "):
        check_form(tokenizer(), WHERE, {(QWEN2,): "new"})


@pytest.mark.parametrize("ids", [[7, 8], ["7"], [True], None])
def test_the_token_before_a_text_has_one_id(ids: Any) -> None:
    start = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    processor = {
        "type": "TemplateProcessing",
        "single": [start, TEXT],
        "special_tokens": {"<s>": {"id": "<s>", "ids": ids, "tokens": ["<s>"]}},
    }
    with pytest.raises(UnsupportedModelError, match="special tokens of one id each"):
        added_by_post_processor({"post_processor": processor}, WHERE)
    processor["special_tokens"]["<s>"]["ids"] = [7]
    assert added_by_post_processor({"post_processor": processor}, WHERE) == [7]
