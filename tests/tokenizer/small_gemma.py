"""A small tokenizer as Gemma-4 has it: characters, tokens for bytes, and ranks of merges."""

from __future__ import annotations

import json
from copy import deepcopy
from functools import cache
from itertools import product
from pathlib import Path
from string import ascii_lowercase
from typing import Any

from tests.tokenizer.small import added

SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<|turn>", "<turn|>", "<|think|>")
SHOWN = ("<|tool_call>", "<tool_call|>", "<|tool_response>", '<|"|>', "<|channel>")
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
_CHARACTERS = ["▁", "\n", "\t", *map(chr, range(0x21, 0x7F))]
_WORDS = ("▁the", "▁def", "▁of", "ing", "▁and", "▁return", "▁▁▁▁", "\n\n\n", "ß", "é", "</s>")
FEWEST = len(SPECIAL) + len(SHOWN) + len(BYTES) + len(_CHARACTERS) + 20
VOCAB_SIZE = 512
CONFIG: dict[str, Any] = {
    "bos_token": "<bos>",
    "eos_token": "<eos>",
    "mask_token": "<mask>",
    "pad_token": "<pad>",
    "unk_token": "<unk>",
    "eot_token": "<turn|>",
    "extra_special_tokens": ["<|turn>", "<turn|>", "<|think|>", *SHOWN],
    "tokenizer_class": "GemmaTokenizer",
}


@cache
def _description(vocab_size: int) -> dict[str, Any]:
    tokens = [*SPECIAL, *SHOWN, *BYTES, *_CHARACTERS]
    merges: list[list[str]] = []
    words = [*_WORDS, *("".join(pair) for pair in product("▁" + ascii_lowercase, repeat=2))]
    for word in words:
        for end in range(2, len(word) + 1):
            if len(tokens) < vocab_size and word[:end] not in tokens:
                tokens.append(word[:end])
                merges.append([word[: end - 1], word[end - 1 : end]])
        if len(word) == 1 and word not in tokens:
            tokens.append(word)
    assert len(tokens) == len(set(tokens)) == vocab_size
    # "\n\n" joined with "\n" comes first, as in the published one: the longest have the best ranks
    merges.sort(key=lambda pair: -len(pair[0]) if set(pair[0]) <= set("\n▁") else 0)
    bos = {"SpecialToken": {"id": "<bos>", "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    other = {"Sequence": {"id": "B", "type_id": 1}}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [added(i, t, special=True) for i, t in enumerate((*SPECIAL, *SHOWN))],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"String": " "},
            "behavior": "MergedWithPrevious",
            "invert": False,
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, text],
            "pair": [bos, text, bos | {"SpecialToken": {"id": "<bos>", "type_id": 1}}, other],
            "special_tokens": {"<bos>": {"id": "<bos>", "ids": [2], "tokens": ["<bos>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": merges,
        },
    }


def gemma_tokenizer(vocab_size: int = VOCAB_SIZE) -> dict[str, Any]:
    """The `tokenizer.json`."""
    return deepcopy(_description(vocab_size))


def write_gemma(
    folder: Path, vocab_size: int = VOCAB_SIZE, description: dict[str, Any] | None = None
) -> Path:
    """Write the files of the tokenizer into a folder; the folder."""
    folder.mkdir(exist_ok=True)
    text = json.dumps(description or _description(vocab_size))
    (folder / "tokenizer.json").write_text(text)
    (folder / "tokenizer_config.json").write_text(json.dumps(CONFIG))
    return folder
