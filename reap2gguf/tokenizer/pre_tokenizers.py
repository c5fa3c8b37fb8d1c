"""How llama.cpp splits text before it merges bytes: one line for each name of `tokenizer.ggml.pre`.

llama.cpp writes most patterns of a tokenizer.json in another way, for `std::regex` or as a loop,
and classes characters by its own tables. `splits` are its patterns (src/llama-vocab.cpp), and
`split_words` does with them what src/unicode.cpp does. Three differences from the tokenizers
library remain, in characters that hardly any text has:

- The library's tables are those of Unicode 16, llama.cpp's are older: a character that Unicode 16
  added is a letter for one and unassigned for the other.
- In `(?i:'s)` the library takes U+017F (long s) for an s, llama.cpp does not.
- Python's own tables, used here, may be older or newer than both: `is_settled` says which
  characters all of them class alike.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

from reap2gguf.models.tokenizer_families import (
    ALL_DIGITS,
    DEEPSEEK_LLM_STEPS,
    DEEPSEEK_V3_STEPS,
    GPT2_PATTERN,
    ONE_DIGIT,
)

# what a tokenizer.json has that changes no text before it is split
NO_NORMALIZER = (None, {"type": "Sequence", "normalizers": []})
_CONTRACTIONS = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _SPACES
)
# a word is letters that are not Han, or Han; what llama.cpp does for Kimi, which has no marks and
# no upper case in it
_KIMI = (
    r"\p{Han}+|[^\r\n\p{L}\p{N}]?(?:(?!\p{Han})\p{L})+"
    + _CONTRACTIONS
    + r"?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    + _SPACES
)
# a word is capital letters and then small ones, where any letter beyond ASCII is either; what
# llama.cpp does for GPT-4o and those that split as it does
_O200K_UPPER, _O200K_LOWER = r"(?:(?=\p{L})[^a-z])", r"(?:(?=\p{L})[^A-Z])"
_O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_O200K_UPPER}*{_O200K_LOWER}+{_CONTRACTIONS}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_O200K_UPPER}+{_O200K_LOWER}*{_CONTRACTIONS}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _SPACES
)
# and for Mistral's Tekken
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_O200K_UPPER}*{_O200K_LOWER}+"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_O200K_UPPER}+{_O200K_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _SPACES
)
_EITHER_CASE = (
    "llama.cpp's {} takes a letter beyond ASCII for a capital and a small one at once, and a "
    "combining mark for no letter, and transformers does not: text such as ÉCOLE can get other "
    "token ids there"
)


@dataclass(frozen=True)
class PreTokenizer:
    """What llama.cpp does for one name.

    Attributes:
        splits: Patterns; each splits further what the ones before it left.
        ignore_merges: Whether a word that is a token becomes that token without merging.
        adds_bos: Whether BOS is added where the header does not say it.
        joins: A pattern that tokenizer.json splits by too and llama.cpp does not, as no token is
            longer than one match of it.
        differs: Where llama.cpp gives other ids than tokenizer.json although it means to give the
            same, as a sentence for the user.
    """

    splits: tuple[str, ...]
    ignore_merges: bool = False
    adds_bos: bool = False
    joins: str | None = None
    differs: str | None = None


# A new family adds its name here, and the patterns of its tokenizer.json to tokenizer_families.
PRE_TOKENIZERS = {
    "qwen2": PreTokenizer(
        (_CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _SPACES,)
    ),
    "qwen35": PreTokenizer(
        (
            _CONTRACTIONS
            + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|"
            + _SPACES,
        )
    ),
    "llama-bpe": PreTokenizer((_LLAMA3,), ignore_merges=True, adds_bos=True),
    "lfm2": PreTokenizer((_LLAMA3,), ignore_merges=True, adds_bos=True),
    "gpt-4o": PreTokenizer(
        (_O200K,),
        differs="llama.cpp's gpt-4o takes a letter beyond ASCII for a capital and a small one at "
        "once, and a combining mark for no letter, and transformers does not: text such as ÉCOLE "
        "can get other token ids there",
    ),
    "glm4": PreTokenizer((_LLAMA3,), ignore_merges=True),
    "deepseek-v3": PreTokenizer(DEEPSEEK_V3_STEPS),
    "deepseek-llm": PreTokenizer(
        (*DEEPSEEK_LLM_STEPS[:-1], ALL_DIGITS),
        joins=ONE_DIGIT,
        differs="llama.cpp takes every wide space, such as U+3000, for a space, where "
        "tokenizer.json takes it for a Chinese character or punctuation: beside one of those it "
        "gets other token ids there",
    ),
    "olmo": PreTokenizer((GPT2_PATTERN,)),
    "refact": PreTokenizer((ONE_DIGIT, GPT2_PATTERN)),
    "kimi-k2": PreTokenizer(
        (_KIMI,),
        differs="llama.cpp's kimi-k2 begins no new word at a capital letter or a combining mark, "
        "and transformers does: text such as camelCase can get other token ids there",
    ),
    "minimax-m2": PreTokenizer((_O200K,), differs=_EITHER_CASE.format("minimax-m2")),
    "tekken": PreTokenizer(
        (_TEKKEN,), ignore_merges=True, adds_bos=True, differs=_EITHER_CASE.format("tekken")
    ),
}

# Characters that stand for a class of characters outside ASCII, as llama.cpp does it: one pattern
# language without Unicode classes is enough then.
_STAND_INS = {"L": "\ue001", "M": "\ue002", "N": "\ue003", "P": "\ue004", "S": "\ue005"}
_SPACE, _OTHER, _HAN_LETTER = "\x0b", "\ue000", "\udc06"  # no text has the last one
# what llama.cpp takes for Han (unicode_cpt_is_han)
_HAN = "㐀-䶿一-\u9fff\uf900-\ufaff\U00020000-\U0002a6df\U0002a700-\U0002ebef\U0002f800-\U0002fa1f"
# White_Space beyond ASCII; the tokenizers library and llama.cpp have the same set
_WIDE_SPACES = frozenset(
    map(chr, (0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029, 0x202F, 0x205F, 0x3000))
)


def split_words(text: str, splits: tuple[str, ...]) -> list[str]:
    """The words that llama.cpp merges each by itself; together they are `text`."""
    bounds = [0, len(text)]
    for pattern in splits:
        subject, expression = _subject(text, pattern), _compiled(pattern)
        bounds = [
            bound
            for start, end in pairwise(bounds)
            for bound in _cuts(expression, subject[start:end], start)
        ] + [len(text)]
    return [text[start:end] for start, end in pairwise(bounds)]


def pattern_for_library(pattern: str) -> str:
    """A pattern as the tokenizers library reads it, that splits text there as llama.cpp does.

    In a class that lists characters, llama.cpp finds no space beyond ASCII.
    """
    if r"\p{" in pattern:
        return pattern.replace(r"\p{Han}", f"[{_HAN}]")
    spaces = "".join(sorted(_WIDE_SPACES))
    return re.sub(r"\[([^\]]*[^\x00-\x7f][^\]]*)\]", rf"[\1&&[^{spaces}]]", pattern)


def is_settled(text: str) -> bool:
    """Whether all tables of Unicode, old and new, class every character of `text` alike."""
    return all(map(_is_settled, text))


def _cuts(expression: re.Pattern[str], piece: str, start: int) -> Iterator[int]:
    """Where words of `piece` begin: its matches, and what lies between them."""
    end = 0
    for match in expression.finditer(piece):
        if match.start() > end:
            yield start + end
        if match.end() > match.start():
            yield start + match.start()
        end = match.end()
    if end < len(piece):
        yield start + end


def _subject(text: str, pattern: str) -> str:
    """`text` with the characters that the classes of `pattern` mean replaced by their stand-ins."""
    if r"\p{Han}" in pattern:
        text = re.sub(f"[{_HAN}]", _HAN_LETTER, text)
        return "".join(char if char == _HAN_LETTER else _collapsed(char) for char in text)
    if r"\p{" in pattern:
        return "".join(map(_collapsed, text))
    return "".join(_SPACE if char in _WIDE_SPACES else char for char in text)


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    r"""A pattern of llama.cpp with its `\p{X}` as sets of ASCII characters and stand-ins."""
    if r"\p{" not in pattern:
        return re.compile(pattern, re.ASCII)
    members = {
        name: "".join(re.escape(char) for char in map(chr, range(128)) if _class(char) == name)
        + stand_in
        for name, stand_in in _STAND_INS.items()
    }
    members |= {"L": members["L"] + _HAN_LETTER, "Han": _HAN_LETTER}
    result, inside, at = "", False, 0
    while at < len(pattern):
        if pattern.startswith(r"\p{", at):
            end = pattern.index("}", at)
            name = pattern[at + 3 : end]
            result += members[name] if inside else f"[{members[name]}]"
            at = end + 1
            continue
        size = 2 if pattern[at] == "\\" else 1
        piece = pattern[at : at + size]
        inside = piece == "[" or (inside and piece != "]")
        result, at = result + piece, at + size
    return re.compile(result, re.ASCII)


@cache
def _collapsed(char: str) -> str:
    """`char` if it is ASCII, else what stands for its class."""
    if char < "\x80":
        return char
    if char in _WIDE_SPACES:
        return _SPACE
    return _STAND_INS.get(_class(char), _OTHER)


def _class(char: str) -> str:
    """The first letter of a character's general category."""
    return unicodedata.category(char)[0]


@cache
def _is_settled(char: str) -> bool:
    """Whether a character has been of one class since Unicode 3.2, which Python has kept."""
    old = unicodedata.ucd_3_2_0.category(char)
    return old != "Cn" and old[0] == _class(char) and char != "\u017f"
