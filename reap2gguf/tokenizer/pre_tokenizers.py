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

# what a tokenizer.json has that changes no text before it is split
NO_NORMALIZER = (None, {"type": "Sequence", "normalizers": []})
_CONTRACTIONS = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _SPACES
)
_DEEPSEEK3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|" + _SPACES
)


@dataclass(frozen=True)
class PreTokenizer:
    """What llama.cpp does for one name.

    Attributes:
        splits: Patterns; each splits further what the ones before it left.
        ignore_merges: Whether a word that is a token becomes that token without merging.
        adds_bos: Whether BOS is added where the header does not say it.
    """

    splits: tuple[str, ...]
    ignore_merges: bool = False
    adds_bos: bool = False


# A new family adds its name here, and the patterns of its tokenizer.json to its MoeModel.
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
    "glm4": PreTokenizer((_LLAMA3,), ignore_merges=True),
    "deepseek-v3": PreTokenizer((r"\p{N}{1,3}", "[一-龥\u3040-ゟ゠-ヿ]+", _DEEPSEEK3)),
}

# Characters that stand for a class of characters outside ASCII, as llama.cpp does it: one pattern
# language without Unicode classes is enough then.
_STAND_INS = {"L": "\ue001", "M": "\ue002", "N": "\ue003", "P": "\ue004", "S": "\ue005"}
_SPACE, _OTHER = "\x0b", "\ue000"
# White_Space beyond ASCII; the tokenizers library and llama.cpp have the same set
_WIDE_SPACES = frozenset(
    map(chr, (0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029, 0x202F, 0x205F, 0x3000))
)


def split_words(text: str, splits: tuple[str, ...]) -> list[str]:
    """The words that llama.cpp merges each by itself; together they are `text`."""
    collapsed = "".join(map(_collapsed, text))
    bounds = [0, len(text)]
    for pattern in splits:
        by_class = r"\p{" in pattern
        subject, expression = collapsed if by_class else text, _compiled(pattern)
        bounds = [
            bound
            for start, end in pairwise(bounds)
            for bound in _cuts(expression, subject[start:end], start)
        ] + [len(text)]
    return [text[start:end] for start, end in pairwise(bounds)]


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
    result, inside, at = "", False, 0
    while at < len(pattern):
        name = pattern[at + 3] if pattern.startswith(r"\p{", at) else ""
        if name:
            result += members[name] if inside else f"[{members[name]}]"
            at += len(r"\p{X}")
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
