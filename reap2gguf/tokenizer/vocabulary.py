"""The vocabulary, merges and added tokens of a `tokenizer.json`, as a GGUF header stores them.

A header has one text and one type per id, and pairs of texts in the order of their ranks. This
module refuses what such a header cannot hold, and what the tokenizers library and llama.cpp read
in two ways: each check says which.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import TokenType

from reap2gguf.errors import CheckpointError, UnsupportedModelError
from reap2gguf.messages import shown
from reap2gguf.models.description import MAX_VOCABULARY
from reap2gguf.tokenizer.byte_symbols import byte_symbols
from reap2gguf.tokenizer.pre_tokenizers import NO_NORMALIZER

Merge = tuple[str, str]

MOST_ADDED = 10_000  # added tokens; real models have up to about 6,500, most of them a few dozen
_LONGEST_ADDED = 1_000  # bytes
_FLAGS = ("lstrip", "rstrip", "single_word")
# bytes that text in UTF-8 can have
_UTF8_BYTES = frozenset(range(256)) - {0xC0, 0xC1, *range(0xF5, 0x100)}
_RESAVE = (
    "load the tokenizer with transformers, correct it and save it with save_pretrained(), or use "
    "the tokenizer.json of the model that this one was made from"
)

# Texts that llama.cpp makes special tokens of, whatever their type in the header: ends of turns
# and of texts, fill-in-the-middle, and gpt-oss's channels.
_ENDS = """
    <|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <|flush|> <|calls|> <end_of_turn>
    <|endoftext|> </s> <|eom_id|> <EOT> _<EOT> [EOT] [EOS] <|end_of_text|> <end_of_utterance>
    <eos> <turn|> <|tool_response> <｜end▁of▁sentence｜> [e~[
"""
ENDS_BY_NAME = frozenset(_ENDS.split())
# one of each group ends an answer too: fill-in-the-middle's padding, repository and file
ENDS_BY_GROUP = (
    ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    ("<|file_sep|>",),
)
_OTHER_NAMES = """
    <|fim_prefix|> <fim-prefix> <fim_prefix> <｜fim▁begin｜> <PRE> ▁<PRE> <|code_prefix|> <|prefix|>
    <|fim_suffix|> <fim-suffix> <fim_suffix> <｜fim▁hole｜> <SUF> ▁<SUF> <|code_suffix|> <|suffix|>
    <|fim_middle|> <fim-middle> <fim_middle> <｜fim▁end｜> <MID> ▁<MID> <|code_middle|> <|middle|>
    <|channel|> <|message|> <|start|> <|constrain|>
"""
SPECIAL_BY_NAME = ENDS_BY_NAME.union(_OTHER_NAMES.split(), *ENDS_BY_GROUP)
# texts that llama.cpp's converter takes for special tokens, though files say that they are not
_SEEM_SPECIAL = ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
_SPECIAL_FORMS = (("<|", "|>"), ("<｜", "｜>"), ("<unused", ">"))
# All of Qwen's vocabularies have this as an ordinary token, which no text reaches in transformers:
# it is split into `</`, `s` and `>` before. For llama.cpp it is a special one.
ORDINARY_IN_QWEN = "</s>"
# Where one of these is in the vocabulary, llama.cpp makes `</s>` an ordinary token.
HIDES_S = ("<|tool_response>", "<|plamo:eos|>")


@dataclass(frozen=True)
class AddedToken:
    """A token that is found in a text before the text is split into words."""

    text: str
    index: int
    special: bool
    normalized: bool  # found only after tokens that are not, in the normalized text


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF header stores of a tokenizer: a text and a type per id, and the merges."""

    tokens: list[str]
    types: list[TokenType]
    merges: list[Merge]
    added: list[AddedToken]
    normalizes: bool  # transformers puts text into NFC first

    @property
    def hides_ordinary(self) -> bool:
        """Whether llama.cpp takes an ordinary token of the vocabulary for a special one."""
        added = {token.text for token in self.added}
        return ORDINARY_IN_QWEN in self.tokens and ORDINARY_IN_QWEN not in added


def read_vocabulary(tokenizer: dict[str, Any], vocab_size: int, where: Path) -> Vocabulary:
    """The vocabulary of a `tokenizer.json`, with unused tokens `[PADi]` for ids that it leaves out.

    `where` is the path of the file, for messages. Raises CheckpointError if the file contradicts
    itself, and UnsupportedModelError for what llama.cpp reads in another way.
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
                f"config's vocab_size {vocab_size}; {_RESAVE}"
            )
        if types[index] == TokenType.NORMAL and tokens[index] != text:
            raise CheckpointError(
                f"{where}: tokens {shown(tokens[index])} and {shown(text)} have the same id "
                f"{index}, expected one token per id; {_RESAVE}"
            )
        tokens[index], types[index] = text, TokenType.NORMAL
    for token in added:
        if vocab.get(token.text, token.index) != token.index:
            raise CheckpointError(
                f"{where}: added token {shown(token.text)} has the id {token.index}, but the "
                f"vocabulary has it as {vocab[token.text]}; {_RESAVE}"
            )
        types[token.index] = added_type(token)
    _check_texts(tokens, types, where)
    merges = merges_of(tokenizer["model"], where)
    _check_merges(merges, vocab, where)
    _check_order(added, where)
    return Vocabulary(tokens, types, merges, added, normalizes)


def read_added_tokens(
    tokenizer: dict[str, Any], where: Path, normalizes: bool = False
) -> list[AddedToken]:
    """The `added_tokens`, each checked by itself; `normalizes` says whether text is put into NFC.

    Raises CheckpointError or UnsupportedModelError that names the first that cannot be written.
    """
    entries = tokenizer.get("added_tokens") or []
    if not isinstance(entries, list) or not all(
        isinstance(entry, dict) and isinstance(entry.get("content"), str) and "id" in entry
        for entry in entries
    ):
        raise CheckpointError(
            f"{where}: added_tokens are not a list of tokens with content and id; {_RESAVE}"
        )
    if len(entries) > MOST_ADDED:
        raise UnsupportedModelError(
            f"{where}: {len(entries):,} added tokens, expected at most {MOST_ADDED:,}; {_RESAVE}"
        )
    found: dict[str, AddedToken] = {}
    for entry in entries:
        token = _added_token(entry, where, normalizes)
        if token.text in found:
            raise CheckpointError(
                f"{where}: added token {shown(token.text)} is there twice, expected once; {_RESAVE}"
            )
        found[token.text] = token
    return list(found.values())


def _added_token(entry: dict[str, Any], where: Path, normalizes: bool) -> AddedToken:
    text = entry["content"]
    if not 0 < len(text.encode()) <= _LONGEST_ADDED:
        raise UnsupportedModelError(
            f"{where}: added token {shown(text)} has {len(text.encode()):,} bytes, expected 1 to "
            f"{_LONGEST_ADDED:,}; {_RESAVE}"
        )
    for flag in _FLAGS:
        if entry.get(flag, False) is not False:
            raise UnsupportedModelError(
                f"{where}: added token {shown(text)} has {flag} {shown(entry[flag])}, expected "
                f"False: llama.cpp takes each added token exactly as it is written; {_RESAVE}"
            )
    special, normalized = entry.get("special", False), entry.get("normalized", True)
    if type(special) is not bool or type(normalized) is not bool:
        raise CheckpointError(
            f"{where}: added token {shown(text)} has special {shown(special)} and normalized "
            f"{shown(normalized)}, expected true or false; {_RESAVE}"
        )
    if normalized and normalizes and not is_nfc(text):
        raise UnsupportedModelError(
            f"{where}: added token {shown(text)} is normalized to NFC before it is looked for, "
            f"expected a token in NFC: llama.cpp does not normalize; {_RESAVE}"
        )
    return AddedToken(text, entry["id"], special, normalized)


def added_type(token: AddedToken) -> TokenType:
    """CONTROL for tokens that never reach the output text, as llama.cpp decides it."""
    looks_special = token.text in _SEEM_SPECIAL or any(
        token.text.startswith(start) and token.text.endswith(end) for start, end in _SPECIAL_FORMS
    )
    return TokenType.CONTROL if token.special or looks_special else TokenType.USER_DEFINED


def _check_texts(tokens: list[str], types: list[TokenType], where: Path) -> None:
    """Refuse texts that llama.cpp cannot load, or would take for special tokens."""
    symbols = byte_symbols()
    alphabet = frozenset(symbols)
    ids: dict[str, int] = {}
    for index, text in enumerate(tokens):
        if ids.setdefault(text, index) != index:
            raise UnsupportedModelError(
                f"{where}: ids {ids[text]} and {index} have both the text {shown(text)}, expected "
                f"one id per text: llama.cpp ends when it loads such a vocabulary; {_RESAVE}"
            )
        if types[index] != TokenType.NORMAL:
            continue
        if not text or not alphabet.issuperset(text):
            raise UnsupportedModelError(
                f"{where}: token {shown(text)} with the id {index} has characters that stand for "
                f"no byte, expected byte-level text; {_RESAVE}"
            )
        if text in SPECIAL_BY_NAME and text != ORDINARY_IN_QWEN:
            raise UnsupportedModelError(
                f"{where}: token {shown(text)} with the id {index} is an ordinary token here, and "
                f"a special one for llama.cpp, expected it among the added_tokens; {_RESAVE}"
            )
    if "</s>" in ids and (hides := next((text for text in HIDES_S if text in ids), None)):
        raise UnsupportedModelError(
            f"{where}: has the tokens '</s>' and {hides!r}, of which llama.cpp makes '</s>' an "
            f"ordinary one, expected not both; {_RESAVE}"
        )
    if missing := [byte for byte in sorted(_UTF8_BYTES) if symbols[byte] not in ids]:
        raise UnsupportedModelError(
            f"{where}: no token for {len(missing)} bytes, the first is 0x{missing[0]:02X} "
            f"({symbols[missing[0]]!r}), expected one for each: llama.cpp and transformers leave "
            f"such a byte out at different points; {_RESAVE}"
        )


def merges_of(model: dict[str, Any], where: Path) -> list[Merge]:
    """The merges of a BPE model as pairs; CheckpointError if they are none."""
    merges = model.get("merges")
    if merges == []:
        raise CheckpointError(f"{where}: no merges; llama.cpp's byte-level BPE needs them")
    if not isinstance(merges, list):
        raise CheckpointError(f"{where}: merges are not a list of pairs of tokens; {_RESAVE}")
    if len({type(merge) for merge in merges}) > 1:
        raise CheckpointError(f"{where}: merges have two forms, expected one; {_RESAVE}")
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
    if not all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(part, str) for part in pair)
        for pair in pairs
    ):
        raise CheckpointError(f"{where}: merges are not a list of pairs of tokens; {_RESAVE}")
    return [(left, right) for left, right in pairs]


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
                f"byte-level text; {_RESAVE}"
            )
        if left not in vocab or right not in vocab or left + right not in vocab:
            missing = next(text for text in (left, right, left + right) if text not in vocab)
            raise CheckpointError(
                f"{where}: merge {rank} joins {shown(left)} and {shown(right)}, but "
                f"{shown(missing)} is not in the vocabulary; {_RESAVE}"
            )
        if ranks.setdefault(pair, rank) != rank:
            raise UnsupportedModelError(
                f"{where}: merges {ranks[pair]} and {rank} both join {shown(left)} and "
                f"{shown(right)}, expected each pair once: llama.cpp takes the first rank, "
                f"transformers the last; {_RESAVE}"
            )


def _check_order(added: list[AddedToken], where: Path) -> None:
    """Refuse added tokens that overlap in a text, where the library and llama.cpp choose otherwise.

    The library takes tokens that are not normalized first, then the one that begins first, of those
    the longest. llama.cpp takes the longest, wherever it begins.
    """
    by_text = {token.text: token for token in added}
    ordered = sorted(by_text)
    for left in added:
        for right, both in _overlapping(left.text, ordered):
            first = left if left.normalized <= by_text[right].normalized else by_text[right]
            if _is_longest(first.text, left.text, right):
                continue
            # both programs take a longer token before `left` if it begins at the same place
            longer = (text for text in _beginning_with(left.text, ordered) if text != left.text)
            if not any(
                both.startswith(text) and by_text[text].normalized is left.normalized
                for text in longer
            ):
                raise _overlap(where, left.text, right)
    raw = [token.text for token in added if not token.normalized]
    for outer in (token.text for token in added if token.normalized):
        if inner := next((text for text in raw if text in outer), None):
            raise _overlap(where, outer, inner)


def _overlapping(text: str, ordered: list[str]) -> Iterator[tuple[str, str]]:
    """The other tokens that begin with an end of `text`, each with the text of the two."""
    for start in range(1, len(text)):
        end = text[start:]
        for other in _beginning_with(end, ordered):
            # one that is this end itself lies inside `text`, which both take first
            if other not in (text, end):
                yield other, text[:start] + other


def _beginning_with(start: str, ordered: list[str]) -> Iterator[str]:
    """The texts of a sorted list that begin with `start`."""
    for position in range(bisect_left(ordered, start), len(ordered)):
        if not ordered[position].startswith(start):
            return
        yield ordered[position]


def _is_longest(taken: str, left: str, right: str) -> bool:
    """Whether `taken` is the longer of the two in bytes; of two equally long ones none is."""
    other = right if taken == left else left
    return len(taken.encode()) > len(other.encode())


def _overlap(where: Path, one: str, other: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{where}: added tokens {shown(one)} and {shown(other)} can overlap in a text, and "
        f"transformers and llama.cpp do not choose the same one; rename one of them: {_RESAVE}"
    )


def is_nfc(text: str) -> bool:
    """Whether `text` is in Unicode's normal form C already."""
    from unicodedata import is_normalized

    return is_normalized("NFC", text)
