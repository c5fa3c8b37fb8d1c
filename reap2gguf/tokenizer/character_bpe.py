"""What a `tokenizer.json` of BPE on characters has, with tokens for bytes.

SentencePiece models are stored so (`sentencepiece.py`), and Gemma-4's (`gemma.py`).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from reap2gguf.errors import CheckpointError, UnsupportedModelError
from reap2gguf.messages import shown
from reap2gguf.tokenizer.advice import RESAVE_ALL

if TYPE_CHECKING:
    from reap2gguf.tokenizer.added_tokens import AddedToken

SPACE = "▁"  # U+2581 stands for a space in tokens
BYTE_TOKENS = tuple(f"<0x{byte:02X}>" for byte in range(256))
MODEL_SETTINGS = {
    "dropout": (None, 0),
    "continuing_subword_prefix": (None, ""),
    "end_of_word_suffix": (None, ""),
    "fuse_unk": (True, False, None),  # no character is unknown where each byte is a token
    "byte_fallback": (True,),
    "ignore_merges": (False, None),
}
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}


def is_sentencepiece(tokenizer: dict[str, Any]) -> bool:
    """Whether a `tokenizer.json` is BPE on characters with tokens for bytes."""
    model = tokenizer.get("model")
    return isinstance(model, dict) and model.get("byte_fallback") is True


def checked_vocab(
    tokenizer: dict[str, Any], added: list[AddedToken], vocab_size: int, path: Path
) -> dict[str, int]:
    """The vocabulary, with one id per text below `vocab_size` and a token for each byte."""
    vocab = tokenizer["model"].get("vocab")
    if not isinstance(vocab, dict) or not vocab:
        raise CheckpointError(f"{path}: no vocabulary")
    for text, index in [*vocab.items(), *((token.text, token.index) for token in added)]:
        if type(index) is not int or not 0 <= index < vocab_size:
            raise CheckpointError(
                f"{path}: token {shown(text)} has the id {shown(index)}, expected one below the "
                f"config's vocab_size {vocab_size}; {RESAVE_ALL}"
            )
    if missing := [token for token in BYTE_TOKENS if token not in vocab]:
        raise UnsupportedModelError(
            f"{path}: no token {missing[0]}, expected one for each of 256 bytes: llama.cpp ends "
            f"where it needs one that is missing; {RESAVE_ALL}"
        )
    return vocab
