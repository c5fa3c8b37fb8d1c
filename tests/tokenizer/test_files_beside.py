from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from reap2gguf.errors import CheckpointError, Reap2ggufError
from reap2gguf.tokenizer.added_tokens import AddedToken
from reap2gguf.tokenizer.files_beside import check_files_beside

ADDED = [
    AddedToken("<e>", 9, special=True, normalized=False),
    AddedToken("<t>", 10, special=False, normalized=True),
]
ENTRY = {"lstrip": False, "rstrip": False, "single_word": False}
END = {"content": "<e>", "special": True, "normalized": False, **ENTRY}
TOOL = {"content": "<t>", "special": False, "normalized": True, **ENTRY}
DECODER = {"9": END, "10": TOOL}


def check(folder: Path, **files: Any) -> None:
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    check_files_beside(folder, ADDED)


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"tokenizer_config": {"eos_token": "<e>", "unk_token": None, "add_bos_token": True}},
        {"tokenizer_config": {"eos_token": {"__type": "AddedToken", **END}, "pad_token": ""}},
        {"tokenizer_config": {"added_tokens_decoder": DECODER}},
        {"tokenizer_config": {"extra_special_tokens": ["<e>", "<t>"]}},
        {"tokenizer_config": {"extra_special_tokens": {"image_token": "<t>"}}},
        {"tokenizer_config": {"extra_special_tokens": {}, "additional_special_tokens": None}},
        {"tokenizer_config": {"additional_special_tokens": [END]}},
        {"tokenizer_config": {"add_prefix_space": False, "split_special_tokens": False}},
        {"tokenizer_config": {"fast_tokenizer_files": ["tokenizer.json"]}},
        {"added_tokens": {"<e>": 9}},
        {"special_tokens_map": {"eos_token": END, "additional_special_tokens": ["<t>"]}},
        {
            "tokenizer_config": {"eos_token": "<e>", "added_tokens_decoder": DECODER},
            "special_tokens_map": {"eos_token": "<t>"},  # transformers does not read it then
        },
    ],
)
def test_files_that_agree(files: dict[str, Any], tmp_path: Path) -> None:
    check(tmp_path, **files)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"tokenizer_config": {"fast_tokenizer_files": ["tokenizer.json", "tokenizer.4.json"]}},
         r"fast_tokenizer_files is \['tokenizer.json', 'tokenizer.4.json'\], expected \[\]"),
        ({"tokenizer_config": {"add_prefix_space": True}}, "add_prefix_space is True"),
        ({"tokenizer_config": {"split_special_tokens": True}}, "split_special_tokens is True"),
        ({"tokenizer_config": {"pad_token": "<pad>"}}, "pad_token is '<pad>', expected what the"),
        ({"tokenizer_config": {"image_token": "<i>"}}, "image_token is '<i>'"),
        ({"tokenizer_config": {"extra_special_tokens": {"x": "<i>"}}}, "tokens is '<i>'"),
        ({"special_tokens_map": {"additional_special_tokens": [{"content": "<i>"}]}}, "'<i>'"),
        ({"tokenizer_config": {"added_tokens_decoder": []}}, "expected tokens by id"),
        ({"tokenizer_config": {"added_tokens_decoder": {"9": END}}}, "does not have '<t>'"),
        ({"tokenizer_config": {"added_tokens_decoder": DECODER | {"11": TOOL}}}, "as '11'"),
        ({"tokenizer_config": {"added_tokens_decoder": DECODER | {"9": TOOL}}}, "as '9'"),
        ({"tokenizer_config": {"added_tokens_decoder": DECODER | {"9": END | {"special": False}}}},
         "as '9'"),
        ({"tokenizer_config": {"added_tokens_decoder": DECODER | {"9": END | {"rstrip": True}}}},
         "as '9'"),
        ({"tokenizer_config": {"added_tokens_decoder": DECODER | {"9": "<e>"}}}, "as '9'"),
        ({"added_tokens": {"<e>": 10}}, "added_tokens.json: token '<e>' has the id 10, expected"),
        ({"added_tokens": {"<i>": 11}}, "token '<i>' has the id 11, expected"),
        ({"tokenizer_config": {"eos_token": "<e>"}, "special_tokens_map": {"eos_token": "<t>"}},
         "eos_token is '<t>', but tokenizer_config.json has '<e>'; delete"),
    ],
)  # fmt: skip
def test_files_that_disagree_are_refused(files: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(Reap2ggufError, match=words):
        check(tmp_path, **files)


def test_a_broken_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "special_tokens_map.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"special_tokens_map\.json: not valid JSON"):
        check_files_beside(tmp_path, ADDED)
