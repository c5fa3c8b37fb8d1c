"""Whether two models have the same tokens: a hash of the ordinary ones, wherever they are stored.

Added tokens and unused ids do not count: publishers rename them.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from gguf import GGUFWriter, Keys, TokenType

from reap2gguf.tokenizer.gguf_keys import add_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

    from reap2gguf.gguf_files.reader import GgufHeader
    from reap2gguf.models.tokenizer_families import TokenizerFamily


def tokens_of_header(header: GgufHeader) -> str:
    """The hash for a GGUF file; empty if its header does not have tokens and their types."""
    keys = Keys.Tokenizer
    tokens, types = (header.metadata.get(key) for key in (keys.LIST, keys.TOKEN_TYPE))
    if not isinstance(tokens, list) or not isinstance(types, list) or len(tokens) != len(types):
        return ""
    return _hash(tokens, types)


def tokens_of_folder(folder: Path, vocab_size: int, family: TokenizerFamily) -> str:
    """The hash for a checkpoint: of the tokens that its GGUF files get.

    Raises CheckpointError or UnsupportedModelError as `add_tokenizer` does.
    """
    logger = logging.getLogger("gguf.vocab")
    before, logger.disabled = logger.disabled, True  # writing a file logs the same lines
    try:
        _, vocabulary = add_tokenizer(GGUFWriter(None, "none"), folder, vocab_size, family)
    finally:
        logger.disabled = before
    return _hash(vocabulary.tokens, vocabulary.types)


def _hash(tokens: Sequence[object], types: Sequence[object]) -> str:
    digest = hashlib.sha256()
    for index, (token, kind) in enumerate(zip(tokens, types, strict=True)):
        if kind == TokenType.NORMAL:
            raw = str(token).encode("utf-8", "surrogatepass")
            digest.update(f"{index} {len(raw)} ".encode() + raw)
    return digest.hexdigest()
