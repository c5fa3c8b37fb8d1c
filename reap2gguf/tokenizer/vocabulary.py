"""The vocabulary, merges and added tokens of a `tokenizer.json`, as a GGUF header stores them.

A header has one text and one type per id, and pairs of texts in the order of their ranks. This
module refuses what such a header cannot hold, and what the tokenizers library and llama.cpp read
in two ways: each check says which.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import TokenType

from reap2gguf.errors import CheckpointError, UnsupportedModelError
from reap2gguf.messages import shown
from reap2gguf.models.description import MAX_VOCABULARY
from reap2gguf.tokenizer.added_tokens import (
    AddedToken,
    added_type,
    overlap_error,
    overlap_of,
    read_added_tokens,
)
from reap2gguf.tokenizer.advice import RESAVE
from reap2gguf.tokenizer.byte_symbols import byte_symbols
from reap2gguf.tokenizer.merges import Merge, merges_of
from reap2gguf.tokenizer.pre_tokenizers import NO_NORMALIZER
from reap2gguf.tokenizer.special_names import HIDES_S, ORDINARY_IN_QWEN, SPECIAL_BY_NAME

# bytes that text in UTF-8 can have
_UTF8_BYTES = frozenset(range(256)) - {0xC0, 0xC1, *range(0xF5, 0x100)}


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF header stores of a tokenizer: a text and a type per id, and the merges."""

    tokens: list[str]
    types: list[TokenType]
    merges: list[Merge]
    added: list[AddedToken]
    normalizes: bool  # transformers puts text into NFC first
    # two added tokens of which, where they overlap in a text, the programs choose another one
    overlap: tuple[str, str] | None = None

    @property
    def unreached(self) -> frozenset[int]:
        """The ids of ordinary tokens of several bytes that no merge makes."""
        made = {left + right for left, right in self.merges}
        return frozenset(
            index
            for index, text in enumerate(self.tokens)
            if self.types[index] == TokenType.NORMAL and len(text) > 1 and text not in made
        )

    @property
    def hides_ordinary(self) -> bool:
        """Whether llama.cpp takes an ordinary token of the vocabulary for a special one."""
        added = {token.text for token in self.added}
        return ORDINARY_IN_QWEN in self.tokens and ORDINARY_IN_QWEN not in added


def read_vocabulary(
    tokenizer: dict[str, Any], vocab_size: int, where: Path, may_overlap: bool = False
) -> Vocabulary:
    """The vocabulary of a `tokenizer.json`, with unused tokens `[PADi]` for ids that it leaves out.

    `where` is the path of the file, for messages; `may_overlap`: added tokens that overlap in a
    text are reported, and not refused. Raises CheckpointError if the file contradicts itself, and
    UnsupportedModelError for what llama.cpp reads in another way.
    """
    if vocab_size > MAX_VOCABULARY:
        raise UnsupportedModelError(
            f"{where.parent}: vocab_size {vocab_size:,} is over {MAX_VOCABULARY:,}"
        )
    vocab = tokenizer["model"]["vocab"]
    normalizes = tokenizer.get("normalizer") not in NO_NORMALIZER
    added = read_added_tokens(tokenizer, where, normalizes)
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    types = [TokenType.UNUSED] * vocab_size
    for text, index in [*vocab.items(), *((token.text, token.index) for token in added)]:
        if type(index) is not int or not 0 <= index < vocab_size:
            raise CheckpointError(
                f"{where}: token {shown(text)} has the id {shown(index)}, expected one below the "
                f"config's vocab_size {vocab_size}; {RESAVE}"
            )
        if types[index] == TokenType.NORMAL and tokens[index] != text:
            raise CheckpointError(
                f"{where}: tokens {shown(tokens[index])} and {shown(text)} have the same id "
                f"{index}, expected one token per id; {RESAVE}"
            )
        tokens[index], types[index] = text, TokenType.NORMAL
    for token in added:
        if vocab.get(token.text, token.index) != token.index:
            raise CheckpointError(
                f"{where}: added token {shown(token.text)} has the id {token.index}, but the "
                f"vocabulary has it as {vocab[token.text]}; {RESAVE}"
            )
        types[token.index] = added_type(token)
    _check_texts(tokens, types, where)
    merges = merges_of(tokenizer["model"], where)
    _check_merges(merges, vocab, where)
    overlap = overlap_of(added)
    if overlap is not None and not may_overlap:
        raise overlap_error(where, *overlap)
    return Vocabulary(tokens, types, merges, added, normalizes, overlap)


def _check_texts(tokens: list[str], types: list[TokenType], where: Path) -> None:
    """Refuse texts that llama.cpp cannot load, or would take for special tokens."""
    symbols = byte_symbols()
    alphabet = frozenset(symbols)
    ids: dict[str, int] = {}
    for index, text in enumerate(tokens):
        if ids.setdefault(text, index) != index:
            raise UnsupportedModelError(
                f"{where}: ids {ids[text]} and {index} have both the text {shown(text)}, expected "
                f"one id per text: llama.cpp ends when it loads such a vocabulary; {RESAVE}"
            )
        if types[index] != TokenType.NORMAL:
            continue
        if not text or not alphabet.issuperset(text):
            raise UnsupportedModelError(
                f"{where}: token {shown(text)} with the id {index} has characters that stand for "
                f"no byte, expected byte-level text; {RESAVE}"
            )
        if text in SPECIAL_BY_NAME and text != ORDINARY_IN_QWEN:
            raise UnsupportedModelError(
                f"{where}: token {shown(text)} with the id {index} is an ordinary token here, and "
                f"a special one for llama.cpp, expected it among the added_tokens; {RESAVE}"
            )
    if "</s>" in ids and (hides := next((text for text in HIDES_S if text in ids), None)):
        raise UnsupportedModelError(
            f"{where}: has the tokens '</s>' and {hides!r}, expected not both: beside the second "
            f"one llama.cpp takes '</s>' for an ordinary token; {RESAVE}"
        )
    if missing := [byte for byte in sorted(_UTF8_BYTES) if symbols[byte] not in ids]:
        raise UnsupportedModelError(
            f"{where}: no token for {len(missing)} bytes, the first is 0x{missing[0]:02X} "
            f"({symbols[missing[0]]!r}), expected one for each: llama.cpp and transformers leave "
            f"such a byte out at different points; {RESAVE}"
        )


def _check_merges(merges: list[Merge], vocab: dict[str, int], where: Path) -> None:
    """Refuse merges of unknown tokens, and pairs with two ranks."""
    alphabet = frozenset(byte_symbols())
    odd = {text for text in vocab if not text or not alphabet.issuperset(text)}
    ranks: dict[Merge, int] = {}
    for rank, pair in enumerate(merges):
        left, right = pair
        if odd and odd.intersection((left, right, left + right)):
            raise UnsupportedModelError(
                f"{where}: merge {rank} joins {shown(left)} and {shown(right)}, expected "
                f"byte-level text; {RESAVE}"
            )
        if left not in vocab or right not in vocab or left + right not in vocab:
            missing = next(text for text in (left, right, left + right) if text not in vocab)
            raise CheckpointError(
                f"{where}: merge {rank} joins {shown(left)} and {shown(right)}, but "
                f"{shown(missing)} is not in the vocabulary; {RESAVE}"
            )
        if ranks.setdefault(pair, rank) != rank:
            raise UnsupportedModelError(
                f"{where}: merges {ranks[pair]} and {rank} both join {shown(left)} and "
                f"{shown(right)}, expected each pair once: llama.cpp takes the first rank, "
                f"transformers the last; {RESAVE}"
            )
