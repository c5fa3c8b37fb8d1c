"""Gemma-4's vocabulary as a GGUF header stores it: BPE on characters, with tokens for bytes.

Spaces become U+2581, and a text is merged as a whole by the ranks of its merges: llama.cpp's
tokenizer `gemma4`. A `tokenizer.json` has the same vocabulary, merges and ranks. llama.cpp's
converter writes one score for all tokens, and shows some special tokens in answers, so that its
parser of chats can read them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gguf import TokenType

from reap2gguf.errors import CheckpointError, UnsupportedModelError
from reap2gguf.messages import shown
from reap2gguf.tokenizer.added_tokens import (
    AddedToken,
    overlap_error,
    overlap_of,
    read_added_tokens,
)
from reap2gguf.tokenizer.advice import RESAVE_ALL
from reap2gguf.tokenizer.character_bpe import (
    BYTE_TOKENS,
    MODEL_SETTINGS,
    REPLACE,
    SPACE,
    checked_vocab,
)
from reap2gguf.tokenizer.merges import checked_merges
from reap2gguf.tokenizer.settings import check_settings, unknown
from reap2gguf.tokenizer.special_names import HIDES_S, SPECIAL_BY_NAME
from reap2gguf.tokenizer.steps import steps_of

if TYPE_CHECKING:
    from reap2gguf.tokenizer.merges import Merge

SCORE = -1000.0  # of every token, as llama.cpp's converter writes it
# special tokens that llama.cpp shows in answers
SHOWN = frozenset(
    {
        *("<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>"),
        *("<|tool_response>", "<tool_response|>", '<|"|>'),
    }
)
# without spaces there is nothing left to split
_SPLIT = {"pattern": ({"String": " "},), "behavior": ("MergedWithPrevious",), "invert": (False,)}


@dataclass(frozen=True)
class GemmaVocabulary:
    """What a GGUF header stores of such a tokenizer: a text and a type per id, and the merges."""

    tokens: list[str]
    types: list[TokenType]
    merges: list[Merge]
    added: list[AddedToken]


def read_gemma(tokenizer: dict[str, Any], vocab_size: int, path: Path) -> GemmaVocabulary:
    """The vocabulary of a `tokenizer.json`, with unused tokens `[PADi]` for ids that it leaves out.

    Raises UnsupportedModelError for a form that llama.cpp does not reproduce, and CheckpointError
    for a file that contradicts itself.
    """
    _check_form(tokenizer, path)
    added = read_added_tokens(tokenizer, path)
    vocab = checked_vocab(tokenizer, added, vocab_size, path)
    merges = checked_merges(tokenizer, vocab, path)
    _check_merges(merges, path)
    tokens = [f"[PAD{index}]" for index in range(vocab_size)]
    types = [TokenType.UNUSED] * vocab_size
    for text, index in vocab.items():
        if types[index] != TokenType.UNUSED:
            raise CheckpointError(
                f"{path}: tokens {shown(tokens[index])} and {shown(text)} have the same id "
                f"{index}, expected one token per id; {RESAVE_ALL}"
            )
        tokens[index] = text
        types[index] = TokenType.BYTE if text in BYTE_TOKENS else TokenType.NORMAL
    made = {left + right for left, right in merges}
    for token in added:
        if vocab.get(token.text, token.index) != token.index or tokens[token.index] not in (
            token.text,
            f"[PAD{token.index}]",
        ):
            raise CheckpointError(
                f"{path}: added token {shown(token.text)} has the id {token.index}, and the "
                f"vocabulary has it otherwise, expected the same; {RESAVE_ALL}"
            )
        tokens[token.index] = token.text
        types[token.index] = _added_type(token, token.text in vocab and token.text in made)
    _check_texts(tokens, types, path)
    found = [token for token in added if types[token.index] != TokenType.NORMAL]
    if (overlap := overlap_of(found)) is not None:
        raise overlap_error(path, *overlap)
    return GemmaVocabulary(tokens, types, merges, added)


def _added_type(token: AddedToken, is_merged: bool) -> TokenType:
    """The type of an added token; one that merges make anyway is an ordinary one.

    llama.cpp's converter has ordinary ones for all that are not special, and llama.cpp does not
    find those that no merge makes, as transformers does.
    """
    if token.text in SHOWN:
        return TokenType.USER_DEFINED
    if token.special:
        return TokenType.CONTROL
    return TokenType.NORMAL if is_merged else TokenType.USER_DEFINED


def _check_form(tokenizer: dict[str, Any], path: Path) -> None:
    """Compare the parts of the file with those of Gemma's."""
    unread = ("vocab", "merges", "unk_token")
    model = {key: value for key, value in tokenizer["model"].items() if key not in unread}
    check_settings(model, MODEL_SETTINGS, "BPE", path, "model")
    if steps_of(tokenizer.get("normalizer"), "normalizers") != [REPLACE]:
        expected = f"spaces replaced by {SPACE}"
        raise unknown(path, "normalizer", tokenizer.get("normalizer"), expected)
    if (part := tokenizer.get("pre_tokenizer")) is not None:
        check_settings(part, _SPLIT, "Split", path, "pre_tokenizer")


def _check_merges(merges: list[Merge], path: Path) -> None:
    """Refuse merges that llama.cpp's header cannot hold, or that it never makes."""
    ranks: dict[Merge, int] = {}
    for rank, (left, right) in enumerate(merges):
        both = left + right
        if " " in both or ("\n" in both and both.strip("\n")):
            raise UnsupportedModelError(
                f"{path}: merge {rank} joins {shown(left)} and {shown(right)}, expected no spaces, "
                f"and line breaks with line breaks alone: llama.cpp splits text there; {RESAVE_ALL}"
            )
        if ranks.setdefault((left, right), rank) != rank:
            raise UnsupportedModelError(
                f"{path}: merges {ranks[left, right]} and {rank} both join {shown(left)} and "
                f"{shown(right)}, expected each pair once: llama.cpp takes the first rank, "
                f"transformers the last; {RESAVE_ALL}"
            )


def _check_texts(tokens: list[str], types: list[TokenType], path: Path) -> None:
    """Refuse texts that llama.cpp cannot load, or would take for special tokens."""
    ids: dict[str, int] = {}
    for index, text in enumerate(tokens):
        if not text or ids.setdefault(text, index) != index:
            raise UnsupportedModelError(
                f"{path}: ids {ids.get(text, index)} and {index} have the text {shown(text)}, "
                f"expected one id per text: llama.cpp ends when it loads others; {RESAVE_ALL}"
            )
    hides_s = any(text in ids for text in HIDES_S)
    for text in SPECIAL_BY_NAME & ids.keys():
        if types[ids[text]] == TokenType.NORMAL and not (text == "</s>" and hides_s):
            raise UnsupportedModelError(
                f"{path}: token {shown(text)} with the id {ids[text]} is an ordinary token here, "
                "and a special one for llama.cpp, expected it among the added_tokens; "
                f"{RESAVE_ALL}"
            )
