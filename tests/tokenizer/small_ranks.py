"""A small `tiktoken.model` with the files that Kimi and Moonlight have beside it."""

from __future__ import annotations

import base64
import json
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Library
from tokenizers import pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from reap2gguf.tokenizer.byte_symbols import byte_symbols
from tests.tokenizer.small import mixed_text

N_RANKS = 2000
VOCAB_SIZE = N_RANKS + 12
NAMED = {
    N_RANKS: "[BOS]",
    N_RANKS + 1: "[EOS]",
    N_RANKS + 2: "<|im_end|>",
    N_RANKS + 3: "<|im_user|>",
    N_RANKS + 5: "[EOT]",
    N_RANKS + 7: "<|im_middle|>",
}


@cache
def tokens() -> tuple[bytes, ...]:
    """The byte sequences in the order of their ranks: all bytes, then what BPE makes of a text."""
    library = Library(BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=N_RANKS, initial_alphabet=alphabet, show_progress=False)
    library.train_from_iterator(mixed_text(seed=8, length=40_000).split("\n"), trainer)
    model = json.loads(library.to_str())["model"]
    bytes_of = {symbol: byte for byte, symbol in enumerate(byte_symbols())}
    made = [bytes(bytes_of[char] for char in "".join(pair)) for pair in model["merges"]]
    return (*(bytes([byte]) for byte in range(256)), *made)


def rank_lines(*more: bytes) -> bytes:
    """The contents of the file."""
    lines = (b"%b %d" % (base64.b64encode(t), i) for i, t in enumerate((*tokens(), *more)))
    return b"\n".join(lines) + b"\n"


def write_ranks(
    folder: Path, data: bytes | None = None, config: dict[str, Any] | None = None
) -> Path:
    """Write the files into a folder; `config` replaces settings of tokenizer_config.json."""
    folder.mkdir(exist_ok=True)
    decoder = {
        str(index): {"content": text, "special": True, "normalized": False}
        for index, text in NAMED.items()
    }
    settings: dict[str, Any] = {
        "added_tokens_decoder": decoder,
        "auto_map": {"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]},
        "bos_token": "[BOS]",
        "eos_token": {"content": "[EOS]"},
        "tokenizer_class": "TikTokenTokenizer",
        "chat_template": "{% for m in messages %}<|im_user|>{{ m.content }}{{ eos_token }}"
        "{% endfor %}",
    }
    ids = {"bos_token_id": N_RANKS, "eos_token_id": N_RANKS + 1}
    text_config = {"model_type": "deepseek_v3", "vocab_size": VOCAB_SIZE, **ids}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | (config or {})))
    (folder / "config.json").write_text(json.dumps(text_config))
    (folder / "tiktoken.model").write_bytes(rank_lines() if data is None else data)
    return folder
