"""Passages become rows and chunks of token ids: cut, or packed.

A row is one sample, cut at T tokens, or T tokens of a text; packed, it holds several samples.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import TYPE_CHECKING

import numpy as np

from reap2gguf.calibration.sources import Corpus, Cut, Passage
from reap2gguf.calibration.stretches import is_far_longer, spread_rows
from reap2gguf.errors import CalibrationError

if TYPE_CHECKING:
    from reap2gguf.artifacts.texts import Row
    from reap2gguf.tokenizer.tokenizer import Tokenizer

_SHORTEST_TAIL = 16  # tokens; a shorter tail says little about the text
_SHORTEST_SAMPLE = 2  # tokens; one token predicts nothing
# A byte-level token holds at least one byte, and a normal form has at most three times the bytes.
_TOKENS_PER_BYTE = 3


@dataclass(frozen=True)
class DrawnRow:
    """A row, and the number of samples in it: 0 where it was cut from a text."""

    tokens: Row
    n_samples: int


def make_rows(
    corpus: Corpus,
    tokenizer: Tokenizer,
    max_length: int,
    n_rows: int | None,
    seed: int,
    on_short: Callable[[], None] = lambda: None,
) -> list[DrawnRow]:
    """At most `n_rows` rows of at most `max_length` tokens, one row per sample.

    The rows of a stream are its first ones, in order; documents and samples are shuffled by `seed`.
    `on_short` is called for each sample that is too short to be a row. Raises CalibrationError if
    there is no row at all.
    """
    cuts = {passage.cut for passage in corpus.passages}
    if cuts == {Cut.DOCUMENT} and n_rows is not None:
        found = spread_documents(corpus, tokenizer, max_length, n_rows, seed)
        if found is not None:
            return found
    rows: list[DrawnRow] = []
    n_tokens = 0
    texts = (passage.text for passage in corpus.passages)
    encoded = tokenizer.encode_all(texts, _needed(cuts, max_length, n_rows))
    for passage, tokens in zip(corpus.passages, encoded, strict=True):
        n_tokens += len(tokens)
        rows.extend(_cut(passage.cut, tokens, max_length, tokenizer.bos))
        if passage.cut is Cut.SAMPLE and len(tokens) < _SHORTEST_SAMPLE:
            on_short()
    if not rows:
        raise _too_short(corpus.spec, n_tokens, max_length)
    if cuts != {Cut.STREAM}:
        random.Random(seed).shuffle(rows)
    return rows[:n_rows]


def _needed(cuts: set[Cut], max_length: int, n_rows: int | None) -> int | None:
    """How many tokens of each passage the rows hold at most; None for all."""
    if cuts == {Cut.SAMPLE}:
        return max(max_length, _SHORTEST_SAMPLE)
    if cuts == {Cut.STREAM} and n_rows is not None:
        return n_rows * max_length
    return None


def spread_documents(
    corpus: Corpus, tokenizer: Tokenizer, max_length: int, n_rows: int, seed: int
) -> list[DrawnRow] | None:
    """Rows of documents that are far longer than the rows, spread over all; None for others.

    Each document gives rows in proportion to its length; a row ends where its document does.
    """
    n_characters = sum(len(passage.text) for passage in corpus.passages)
    if not is_far_longer(n_characters, n_rows * max_length):
        return None
    draw = random.Random(seed)
    rows: list[DrawnRow] = []
    begin = 0
    for passage in corpus.passages:
        end = begin + len(passage.text)
        wanted = end * n_rows // n_characters - begin * n_rows // n_characters
        begin = end
        if wanted:
            lengths = min(_SHORTEST_TAIL, max_length), max_length
            found = spread_rows(passage.text, tokenizer, wanted, lengths, draw)
            if found is None:
                return None
            rows += [DrawnRow(row, 0) for row in found]
    draw.shuffle(rows)
    return rows


@dataclass
class RowPacker:
    """Makes rows of passages, several samples per row; all else is cut as without packing."""

    tokenizer: Tokenizer
    max_length: int
    seed: int
    n_tokens: int = 0  # of all passages that were read

    def make(
        self, passages: Iterable[Passage], spec: str, n_rows: int, on_row: Callable[[], None]
    ) -> list[DrawnRow]:
        """At most `n_rows` rows of `passages`, in which samples come last.

        No more samples are taken than the rows need; `on_row` is called for each packed row. Where
        there are documents among them, all rows are shuffled. Raises CalibrationError if there is
        no row at all.
        """
        cut: list[DrawnRow] = []
        cuts: set[Cut] = set()
        packed = []
        for row in islice(
            pack(self._samples(passages, cut, cuts, n_rows), self.max_length), n_rows
        ):
            packed.append(row)
            on_row()
        rows = cut + packed
        if not rows:
            raise _too_short(spec, self.n_tokens, self.max_length)
        if Cut.DOCUMENT in cuts:
            random.Random(self.seed).shuffle(rows)
        return rows[:n_rows]

    def _samples(
        self, passages: Iterable[Passage], cut: list[DrawnRow], cuts: set[Cut], n_rows: int
    ) -> Iterator[Row]:
        """The tokens of each sample; the rows of other passages go into `cut`."""
        n_needed, n_free = n_rows * self.max_length, self.max_length
        passages = iter(passages)
        while batch := self._batch(passages, max(1, n_needed), cut, cuts):
            for tokens in self.tokenizer.encode_all(batch, self.max_length):
                self.n_tokens += len(tokens)
                yield tokens
                n_used = min(len(tokens), n_free)  # as `pack` does
                n_needed, n_free = n_needed - n_used, n_free - n_used or self.max_length

    def _batch(
        self, passages: Iterator[Passage], n_needed: int, cut: list[DrawnRow], cuts: set[Cut]
    ) -> list[str]:
        """The texts of the next samples, as many as `n_needed` tokens need for certain."""
        texts: list[str] = []
        n_most = 0  # tokens that they may have
        while n_most < n_needed and (passage := next(passages, None)) is not None:
            cuts.add(passage.cut)
            if passage.cut is Cut.SAMPLE:
                texts.append(passage.text)
                n_most += len(passage.text.encode("utf-8")) * _TOKENS_PER_BYTE
                continue
            tokens = self.tokenizer.encode(passage.text)
            self.n_tokens += len(tokens)
            cut.extend(_cut(passage.cut, tokens, self.max_length, self.tokenizer.bos))
        return texts


def pack(samples: Iterable[Row], length: int) -> Iterator[DrawnRow]:
    """Samples one after another in rows of exactly `length` tokens, as REAP packs them.

    The rule is that of https://github.com/CerebrasResearch/reap, `src/reap/data.py`: a row starts
    with a new sample; the sample that crosses its end is cut there, and its rest is in no row; the
    last row is kept though it is not full. Attention is not masked between samples.
    REAP also leaves one masked position between two samples, which is not a token and not counted;
    here nothing is between them, so that a row has a few more tokens. A last row of one token,
    which predicts nothing, is dropped. The next sample is taken only while a row is not full.
    """
    parts: list[Row] = []
    n_free = length
    for tokens in samples:
        if len(tokens):
            parts.append(tokens[:n_free])
            n_free -= len(parts[-1])
        if not n_free:
            yield DrawnRow(np.concatenate(parts), len(parts))
            parts, n_free = [], length
    if length - n_free >= _SHORTEST_SAMPLE:
        yield DrawnRow(np.concatenate(parts), len(parts))


def chunk_text(text: str, tokenizer: Tokenizer, chunk_size: int, where: str) -> list[Row]:
    """A text cut into consecutive chunks of exactly `chunk_size` tokens, as llama-imatrix does."""
    tokens = tokenizer.encode(text)
    chunks = [chunk.tokens for chunk in _cut(Cut.STREAM, tokens, chunk_size, tokenizer.bos)]
    if not chunks:
        raise CalibrationError(
            f"{where}: {len(tokens):,} tokens do not fill one chunk of {chunk_size:,}; give more "
            "text or a smaller --chunk"
        )
    return chunks


def spread(n_of: int, n: int, seed: int) -> list[int]:
    """`n` numbers below `n_of`, ascending, spread evenly and drawn by `seed`.

    `n_of` is divided into `n` equal stretches, and one number is drawn from each. All numbers where
    `n` is not less than `n_of`.
    """
    if n >= n_of:
        return list(range(n_of))
    draw = random.Random(seed)
    ends = [stretch * n_of // n for stretch in range(n + 1)]
    return [draw.randrange(begin, end) for begin, end in pairwise(ends)]


def _cut(cut: Cut, tokens: Row, length: int, bos: int | None) -> Iterator[DrawnRow]:
    """The rows of one passage."""
    if cut is Cut.SAMPLE:
        # a sample has its own beginning; a template writes its own BOS
        if len(tokens) >= _SHORTEST_SAMPLE:
            yield DrawnRow(tokens[:length], 1)
        return
    for first in range(0, len(tokens), length):
        row = tokens[first : first + length].copy()
        shortest = length if cut is Cut.STREAM else min(_SHORTEST_TAIL, length)
        if len(row) < shortest:
            return
        if bos is not None:
            row[0] = bos  # as llama-imatrix does: each chunk starts like a text
        yield DrawnRow(row, 0)


def _too_short(spec: str, n_tokens: int, length: int) -> CalibrationError:
    return CalibrationError(
        f"calibration {spec!r}: {n_tokens:,} tokens do not fill one row of {length:,}; give more "
        "text or a smaller --max-length"
    )
