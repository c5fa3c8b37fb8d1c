r"""Cuts a long text into pieces that a tokenizer may encode one by one, in threads.

The ids of the pieces, one after another, are those of the whole text. A cut lies where

- an ASCII letter is followed by a space and another ASCII letter (before the space), or
- a line break that follows something else than white space is followed by a letter or digit, or
- a Chinese character is followed by one mark of Chinese punctuation.

All known ways of splitting text begin a new word at each of these, whatever stands around:

- A run of letters takes no space and no punctuation, and only a space or punctuation before it. In
  patterns that list scripts, letters and Chinese characters are taken by steps of their own.
- A line break is taken by itself, or at the end of `\s*[\r\n]+` or `[\r\n]*`, which no pattern
  continues to a letter; or by `\s+`, whose end depends on what follows only where several white
  spaces stand together.
- Digits that are split off before are words already.

So each word lies on one side of the cut, and BPE merges inside words. Normalization form C composes
nothing with a space, a line break or that punctuation. A tokenizer of another form, such as one of
SentencePiece, which splits nothing, or with an added token that has such a place inside, is given
the whole text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from tokenizers import Tokenizer as Encoder

from reap2gguf.models.tokenizer_families import known_patterns
from reap2gguf.tokenizer.pre_tokenizers import PRE_TOKENIZERS, pattern_for_library
from reap2gguf.tokenizer.steps import split_patterns, steps_of

PIECE = 2**14  # characters of a piece, about
_CUT = re.compile(
    r"(?<=[A-Za-z])(?= [A-Za-z])|(?<=\S\n)(?=[^\W_])|(?<=[\u4e00-\u9fa5])(?=[，。、；：？！])"
)
_SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False}
# of published tokenizers, and of those made from GGUF files
KNOWN_PATTERNS = frozenset(
    [
        *known_patterns(),
        *(tuple(map(pattern_for_library, kind.splits)) for kind in PRE_TOKENIZERS.values()),
    ]
)
_NORMALIZERS = (None, {"type": "NFC"}, {"type": "Sequence", "normalizers": []})


def cuts_anywhere(encoder: Encoder) -> bool:
    """Whether the ids of a text are those of its pieces, one after another."""
    model = encoder.model
    is_plain = type(model).__name__ == "BPE" and not any(
        (model.dropout, model.continuing_subword_prefix, model.end_of_word_suffix)
    )
    if not is_plain or _state(encoder.normalizer) not in _NORMALIZERS:
        return False
    if not _splits_words(_state(encoder.pre_tokenizer)):
        return False
    for token in encoder.get_added_tokens_decoder().values():
        # these flags let a token take the spaces beside it, or look at its neighbours
        if token.lstrip or token.rstrip or token.single_word or _CUT.search(token.content):
            return False
    return True


def _state(part: Any) -> Any:
    """A part of a tokenizer as its JSON value."""
    return None if part is None else json.loads(part.__getstate__())


def _splits_words(part: Any) -> bool:
    """Whether a pre-tokenizer is one of the known ways of splitting text, then bytes."""
    *splits, last = steps_of(part) or [{}]
    has_split = any(step.get("type") == "Split" for step in splits)
    return (
        split_patterns(part) in KNOWN_PATTERNS
        and all(step.get("type") == "Digits" or _SPLIT.items() <= step.items() for step in splits)
        and _BYTE_LEVEL.items() <= last.items()
        and last.get("use_regex", True) is not has_split
    )


def next_cut(text: str, position: int) -> int:
    """The first place at or after `position` where `text` may be cut: its end at the latest."""
    found = _CUT.search(text, position) if position else None
    return 0 if not position else len(text) if found is None else found.start()


def pieces(text: str, size: int = PIECE) -> Iterator[str]:
    """A text in pieces of about `size` characters; an empty text is one piece."""
    begin = 0
    while begin < len(text) or not begin:
        end = next_cut(text, begin + size) if begin + size < len(text) else len(text)
        yield text[begin:end]
        begin = end
        if not text:
            return
