"""The added tokens of a `tokenizer.json`: found in a text before it is split into words.

Refused is what the tokenizers library and llama.cpp read in two ways: each check says which.
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
from reap2gguf.tokenizer.advice import RESAVE

MOST_ADDED = 10_000  # added tokens; real models have up to about 6,500, most of them a few dozen
_LONGEST_ADDED = 1_000  # bytes
_FLAGS = ("lstrip", "rstrip", "single_word")
# texts that llama.cpp's converter takes for special tokens, though files say that they are not
_SEEM_SPECIAL = ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
_SPECIAL_FORMS = (("<|", "|>"), ("<｜", "｜>"), ("<unused", ">"))


@dataclass(frozen=True)
class AddedToken:
    """A token that is found in a text before the text is split into words."""

    text: str
    index: int
    special: bool
    normalized: bool  # found only after tokens that are not, in the normalized text


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
            f"{where}: added_tokens are not a list of tokens with content and id; {RESAVE}"
        )
    if len(entries) > MOST_ADDED:
        raise UnsupportedModelError(
            f"{where}: {len(entries):,} added tokens, expected at most {MOST_ADDED:,}; {RESAVE}"
        )
    found: dict[str, AddedToken] = {}
    for entry in entries:
        token = _added_token(entry, where, normalizes)
        if token.text in found:
            raise CheckpointError(
                f"{where}: added token {shown(token.text)} is there twice, expected once; {RESAVE}"
            )
        found[token.text] = token
    return list(found.values())


def _added_token(entry: dict[str, Any], where: Path, normalizes: bool) -> AddedToken:
    text = entry["content"]
    if not 0 < len(text.encode()) <= _LONGEST_ADDED:
        raise UnsupportedModelError(
            f"{where}: added token {shown(text)} has {len(text.encode()):,} bytes, expected 1 to "
            f"{_LONGEST_ADDED:,}; {RESAVE}"
        )
    for flag in _FLAGS:
        if entry.get(flag, False) is not False:
            raise UnsupportedModelError(
                f"{where}: added token {shown(text)} has {flag} {shown(entry[flag])}, expected "
                f"False: llama.cpp takes each added token exactly as it is written; {RESAVE}"
            )
    special, normalized = entry.get("special", False), entry.get("normalized", True)
    if type(special) is not bool or type(normalized) is not bool:
        raise CheckpointError(
            f"{where}: added token {shown(text)} has special {shown(special)} and normalized "
            f"{shown(normalized)}, expected true or false; {RESAVE}"
        )
    if normalized and normalizes and not is_nfc(text):
        raise UnsupportedModelError(
            f"{where}: added token {shown(text)} is normalized to NFC before it is looked for, "
            f"expected a token in NFC: llama.cpp does not normalize; {RESAVE}"
        )
    return AddedToken(text, entry["id"], special, normalized)


def added_type(token: AddedToken) -> TokenType:
    """CONTROL for tokens that never reach the output text, as llama.cpp decides it."""
    looks_special = token.text in _SEEM_SPECIAL or any(
        token.text.startswith(start) and token.text.endswith(end) for start, end in _SPECIAL_FORMS
    )
    return TokenType.CONTROL if token.special or looks_special else TokenType.USER_DEFINED


def overlap_of(added: list[AddedToken]) -> tuple[str, str] | None:
    """Two added tokens that overlap in a text, where the library and llama.cpp choose otherwise.

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
                return left.text, right
    raw = [token.text for token in added if not token.normalized]
    for outer in (token.text for token in added if token.normalized):
        if inner := next((text for text in raw if text in outer), None):
            return outer, inner
    return None


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


def overlap_error(where: Path, one: str, other: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{where}: added tokens {shown(one)} and {shown(other)} can overlap in a text, and "
        f"transformers and llama.cpp do not choose the same one; rename one of them: {RESAVE}"
    )


def is_nfc(text: str) -> bool:
    """Whether `text` is in Unicode's normal form C already."""
    from unicodedata import is_normalized

    return is_normalized("NFC", text)
