"""Decides at plan time whether a checkpoint's tokenizer can be written for llama.cpp."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from gguf import GGUFWriter, Keys

from reap2gguf.errors import CheckpointError
from reap2gguf.tokenizer.caveats import tokenizer_caveats
from reap2gguf.tokenizer.gemma import GemmaVocabulary
from reap2gguf.tokenizer.gguf_keys import add_tokenizer, header_value
from reap2gguf.tokenizer.probe import (
    check_against_library,
    check_gemma_against_library,
    check_spm_against_library,
)
from reap2gguf.tokenizer.sentencepiece import SpmVocabulary
from reap2gguf.tokenizer.tokenizer_files import tokenizer_path

if TYPE_CHECKING:
    from pathlib import Path

    from reap2gguf.models.tokenizer_families import TokenizerFamily


def check_tokenizer(folder: Path, vocab_size: int, family: TokenizerFamily) -> tuple[str, ...]:
    """Refuse a tokenizer that `add_tokenizer` would refuse later, or that does not load.

    Compares the token ids of a text of hard cases, too. For a vocabulary of 150,000 tokens it takes
    about a second and 200 MB. Returns what a user should know of it, one sentence each. Raises
    CheckpointError or UnsupportedModelError.
    """
    logger = logging.getLogger("gguf.vocab")
    before, logger.disabled = logger.disabled, True  # writing the file logs the same lines
    writer = GGUFWriter(None, "none")
    try:
        pre, vocabulary = add_tokenizer(writer, folder, vocab_size, family)
    finally:
        logger.disabled = before
    eos = header_value(writer, Keys.Tokenizer.EOS_ID)
    if eos is None:
        raise CheckpointError(
            f"{folder}: no eos_token among the added tokens and no single eos_token_id in "
            "config.json, expected one: llama.cpp would end each answer at token 11; set eos_token "
            "in tokenizer_config.json"
        )
    if isinstance(vocabulary, GemmaVocabulary):
        check_gemma_against_library(vocabulary, tokenizer_path(folder))
    elif isinstance(vocabulary, SpmVocabulary):
        check_spm_against_library(vocabulary, tokenizer_path(folder))
    else:
        check_against_library(vocabulary, tokenizer_path(folder), pre)
    keys = (Keys.Tokenizer.EOS_ID, Keys.Tokenizer.EOT_ID, Keys.Tokenizer.EOM_ID)
    ends = [header_value(writer, key) for key in keys]
    return tokenizer_caveats(folder, pre, vocabulary, ends)
