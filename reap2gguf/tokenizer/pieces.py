r"""Cuts a long text into pieces that a tokenizer may encode one by one, in threads.

The ids of the pieces, one after another, are those of the whole text. A cut lies where

- an ASCII letter is followed by a space and another ASCII letter (before the space), or
- a line break is followed by a letter or digit, or
- a Chinese character is followed by one mark of Chinese punctuation.

The patterns of `QWEN_PRE_TOKENIZERS` begin a new word at each of these, whatever stands around:

- Letters are matched by `\p{L}+` or as the end of `'s`, and neither takes a space or punctuation.
- A line break is the last character of `\s*[\r\n]+` or `[\r\n]*`: both take it before `\s+` can,
  the only alternative whose end depends on what follows. None goes on from it to a letter.

So each word lies on one side of the cut, and BPE merges inside words. Normalization form C composes
nothing with a space, a line break or that punctuation. A tokenizer of another form, or with an
added token that has such a place inside, is given the whole text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from tokenizers import Tokenizer as Encoder

from reap2gguf.models.tokenizer_families import QWEN_PRE_TOKENIZERS

PIECE = 2**14  # characters of a piece, about
_CUT = re.compile(
    r"(?<=[A-Za-z])(?= [A-Za-z])|(?<=\n)(?=[^\W_])|(?<=[\u4e00-\u9fa5])(?=[，。、；：？！])"
)
_SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
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
    """Whether a pre-tokenizer is one of the patterns above, then bytes."""
    steps = part.get("pretokenizers") if isinstance(part, dict) else None
    if not isinstance(steps, list) or len(steps) < 2:
        return False
    *splits, last = steps
    patterns = tuple(step.get("pattern", {}).get("Regex") for step in splits)
    return (
        patterns in QWEN_PRE_TOKENIZERS
        and all(_SPLIT.items() <= step.items() for step in splits)
        and _BYTE_LEVEL.items() <= last.items()
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
