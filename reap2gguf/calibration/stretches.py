"""Rows that are spread over a text far longer than they need, which is not tokenized whole.

The text is divided into equal stretches by its characters, one per row. A row begins at a place in
the first half of its stretch, drawn at random, and its tokens are those that the whole text has
there (`tokenizer/pieces.py`). So two rows never share a token, and each part of the text gives as
many as any other.

A text of 16 Mi characters or less is tokenized whole, in a few seconds, and its rows are counted.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from reap2gguf.artifacts.texts import Row
    from reap2gguf.tokenizer.tokenizer import Tokenizer

SHORT_TEXT = 2**24  # characters
_FAR = 16  # characters for each token that is needed: about four times as many as hold it


def is_far_longer(n_characters: int, n_tokens: int) -> bool:
    """Whether a text is so long that only parts of it are read for `n_tokens` tokens."""
    return n_characters > max(SHORT_TEXT, n_tokens * _FAR)


def spread_rows(
    text: str, tokenizer: Tokenizer, n_rows: int, lengths: tuple[int, int], draw: random.Random
) -> list[Row] | None:
    """`n_rows` rows of a text, one of each stretch, in the order of the text.

    `lengths` are the fewest and the most tokens of a row: a row ends at the most, or where its
    stretch does. None where a row would have fewer, or the tokenizer cannot begin inside a text:
    then the whole text has to be read.
    """
    fewest, most = lengths
    places: list[tuple[int, int]] = []
    for start, end in _stretches(len(text), n_rows, draw):
        first, last = tokenizer.next_cut(text, start), tokenizer.next_cut(text, end)
        if first is None or last is None:
            return None
        places.append((first, last))
    rows = []
    for ids in tokenizer.encode_all((text[first:last] for first, last in places), most):
        if len(ids) < fewest:
            return None
        rows.append(ids[:most].copy())
        if tokenizer.bos is not None:
            rows[-1][0] = tokenizer.bos  # as llama-imatrix does: each chunk starts like a text
    return rows


def _stretches(n_characters: int, n_rows: int, draw: random.Random) -> Iterator[tuple[int, int]]:
    """A drawn place in the first half of each stretch, and the end of the stretch."""
    bounds = (number * n_characters // n_rows for number in range(n_rows + 1))
    for begin, end in pairwise(bounds):
        yield draw.randrange(begin, begin + max(1, (end - begin) // 2)), end
