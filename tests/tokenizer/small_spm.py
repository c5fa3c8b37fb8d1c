"""A small SentencePiece tokenizer, as Mixtral has it: tokenizer.json and tokenizer.model."""

from __future__ import annotations

import json
import struct
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Library
from tokenizers import pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from tests.tokenizer.small import added, mixed_text

SPECIAL = ("<unk>", "<s>", "</s>")
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
N_TRAINED = 1500
VOCAB_SIZE = len(SPECIAL) + 256 + N_TRAINED + 2  # two ids are for added tokens
SPACES = ("▁▁", "▁▁▁▁", "▁▁▁", "▁▁▁▁▁▁▁▁")  # of one score, the last, as Mistral's have it
SPACES_SCORE = -1e9
CONFIG: dict[str, Any] = {
    "add_bos_token": True,
    "add_eos_token": False,
    "added_tokens_decoder": {
        str(i): {"content": text, "special": True, "normalized": False}
        for i, text in enumerate(SPECIAL)
    },
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "legacy": True,
    "tokenizer_class": "LlamaTokenizer",
}


@cache
def scores() -> dict[str, float]:
    """The scores of a trained vocabulary, without special tokens and bytes, in the order of ids."""
    library = Library(BPE())
    library.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    trainer = BpeTrainer(vocab_size=N_TRAINED - len(SPACES) - 20, show_progress=False)
    text = "".join(c for c in mixed_text(seed=5, length=30_000) if "\n" <= c < "\u2000")
    library.train_from_iterator(text.split("\n"), trainer)
    model = json.loads(library.to_str())["model"]
    made = ["".join(pair) for pair in model["merges"] if set("".join(pair)) != {"▁"}]
    single = [text for text in model["vocab"] if len(text) == 1]
    order = [*SPACES, *made, *single]
    order += [f"qz{i}" for i in range(N_TRAINED - len(order))]
    return {
        text: SPACES_SCORE if text in SPACES else -float(index) for index, text in enumerate(order)
    }


def merges() -> list[list[str]]:
    """The merges of the vocabulary in the order in which transformers makes them of scores."""
    known = scores()
    pairs = [
        (score, left, right)
        for text, score in known.items()
        for left, right in ((text[:at], text[at:]) for at in range(1, len(text)))
        if left in known and right in known
    ]
    pairs.sort(key=lambda pair: (pair[0], len(pair[1]), len(pair[2])), reverse=True)
    return [[left, right] for _, left, right in pairs]


@cache
def _description() -> dict[str, Any]:
    vocab = {text: index for index, text in enumerate([*SPECIAL, *BYTES, *scores()])}
    start = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [added(i, text, special=True) for i, text in enumerate(SPECIAL)],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [start, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [
                start,
                {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": "<s>", "type_id": 1}},
                {"Sequence": {"id": "B", "type_id": 1}},
            ],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
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
            "vocab": vocab,
            "merges": merges(),
        },
    }


def spm_tokenizer() -> dict[str, Any]:
    """The `tokenizer.json`."""
    return deepcopy(_description())


def piece_model(
    pieces: list[tuple[str, float, int]] | None = None,
    model_type: int = 2,
    normalizer: str = "identity",
    adds_space: bool = True,
    removes_spaces: bool = False,
) -> bytes:
    """The bytes of `tokenizer.model`; a piece is text, score and type."""
    if pieces is None:
        pieces = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
        pieces += [(text, 0.0, 6) for text in BYTES]
        pieces += [(text, score, 1) for text, score in scores().items()]
    found = b""
    for text, score, kind in pieces:
        piece = _bytes(1, text.encode()) + b"\x15" + struct.pack("<f", score)
        found += _bytes(1, piece + (_number(3, kind) if kind != 1 else b""))
    settings = _bytes(1, normalizer.encode()) + _number(3, adds_space) + _number(4, removes_spaces)
    return found + _bytes(2, _number(3, model_type) + _number(35, 1)) + _bytes(3, settings)


def _bytes(number: int, data: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _number(number: int, value: int) -> bytes:
    return _varint(number << 3) + _varint(int(value))


def _varint(value: int) -> bytes:
    found = b""
    while value > 0x7F:
        found += bytes([value & 0x7F | 0x80])
        value >>= 7
    return found + bytes([value])


def write_spm(
    folder: Path,
    description: dict[str, Any] | None = None,
    model: bytes | None = b"",
    config: dict[str, Any] | None = None,
) -> Path:
    """Write the files into a folder; `model` None leaves out tokenizer.model."""
    folder.mkdir(exist_ok=True)
    text = json.dumps(description or spm_tokenizer())
    (folder / "tokenizer.json").write_text(text)
    settings = {k: v for k, v in (CONFIG | (config or {})).items() if v is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    ids = {"bos_token_id": 1, "eos_token_id": 2, "vocab_size": VOCAB_SIZE, "model_type": "mixtral"}
    (folder / "config.json").write_text(json.dumps(ids))
    if model is not None:
        (folder / "tokenizer.model").write_bytes(model or piece_model())
    return folder
