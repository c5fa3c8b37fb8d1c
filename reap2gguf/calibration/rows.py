"""Passages become rows of tokens: the model's tokenizer, its chat template, and the cutting."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from reap2gguf.calibration.corpus import Corpus, Cut, Passage
from reap2gguf.calibration.tool_calls import Message
from reap2gguf.errors import CalibrationError, CheckpointError
from reap2gguf.tokenizer.panics import panics_as
from reap2gguf.tokenizer.template_files import check_template_files
from reap2gguf.tokenizer.templates import ChatTemplate

Row = npt.NDArray[np.int64]
# A tail this short says nothing about the middle of a text.
_SHORTEST_ROW = 16
_SHORTEST_SAMPLE = 2


@dataclass(frozen=True)
class Counted:
    """A row, and how many samples are in it: none where it is cut from a text."""

    row: Row
    n_samples: int


class Tokenizer:
    """A checkpoint's tokenizer, as far as calibration needs it."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer

        check_template_files(folder)
        with panics_as(CheckpointError, f"{folder}: no usable tokenizer"):
            self._tokenizer: Any = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
            # what the tokenizer puts before any text: one BOS or nothing
            prefix = self._tokenizer("")["input_ids"]
        if not self._tokenizer.is_fast:
            raise CheckpointError(f"{folder}: has no tokenizer.json (a fast tokenizer is needed)")
        self.bos: int | None = prefix[0] if prefix else None
        self._chat = _chat_template(self._tokenizer, folder)

    def encode(self, text: str) -> Row:
        """Token ids of a text, special tokens in it recognised, none added."""
        with panics_as(CalibrationError, "the tokenizer fails on the calibration text"):
            encoding = self._tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
        return np.asarray(encoding.ids, dtype=np.int64)

    def render_chat(
        self, messages: list[Message], tools: list[Mapping[str, Any]] | None = None
    ) -> str:
        """Messages through the model's chat template, which runs in a process of its own.

        Without a template the contents follow one another. Raises CalibrationError if the template
        refuses the messages or takes too much.
        """
        if self._chat is None:
            return "\n".join(_text_of(message["content"]) for message in messages)
        return self._chat.render(messages, tools)

    def close(self) -> None:
        """End the process that renders; the next rendering starts another."""
        if self._chat is not None:
            self._chat.close()


def _chat_template(tokenizer: Any, folder: Path) -> ChatTemplate | None:
    found = tokenizer.chat_template
    if found is None:
        return None
    texts = found.values() if isinstance(found, dict) else [found]
    if not all(isinstance(text, str) for text in texts):
        raise CheckpointError(f"{folder}: its chat template is not text")
    return ChatTemplate(found, tokenizer.special_tokens_map)


def _text_of(content: Any) -> str:
    """What a message says: a string, or the texts among its parts."""
    if not isinstance(content, list):
        return "" if content is None else str(content)
    texts = [part.get("text") if isinstance(part, dict) else part for part in content]
    return "".join(text for text in texts if isinstance(text, str))


def make_rows(
    corpus: Corpus, tokenizer: Tokenizer, max_length: int, n_samples: int | None, seed: int
) -> list[Counted]:
    """At most `n_samples` rows of at most `max_length` tokens, each sample a row of its own.

    Rows of a stream are its first ones, in order; documents and samples are shuffled by `seed`.
    Raises CalibrationError if there is not one row.
    """
    rows: list[Counted] = []
    n_tokens = 0
    for passage in corpus.passages:
        tokens = tokenizer.encode(passage.text)
        n_tokens += len(tokens)
        rows.extend(_cut(passage, tokens, max_length, tokenizer.bos))
    if not rows:
        raise _too_short(corpus.spec, n_tokens, max_length)
    if any(passage.cut is not Cut.STREAM for passage in corpus.passages):
        random.Random(seed).shuffle(rows)
    return rows[:n_samples]


def make_packed_rows(
    passages: Iterable[Passage], spec: str, tokenizer: Tokenizer, max_length: int, n_rows: int,
    seed: int, on_row: Callable[[], None],
) -> list[Counted]:  # fmt: skip
    """At most `n_rows` rows of `passages`: the samples, which come last, packed, all else cut.

    Of samples, no more are taken than fill the rows; `on_row` is told of each. Where documents are
    among them, all rows are shuffled by `seed`. Raises CalibrationError if there is not one row.
    """
    cut: list[Counted] = []
    n_tokens, has_documents = 0, False

    def samples() -> Iterator[Row]:
        nonlocal n_tokens, has_documents
        for passage in passages:
            tokens = tokenizer.encode(passage.text)
            n_tokens += len(tokens)
            if passage.cut is Cut.SAMPLE:
                yield tokens
            else:
                has_documents |= passage.cut is Cut.DOCUMENT
                cut.extend(_cut(passage, tokens, max_length, tokenizer.bos))

    packed = []
    for row in islice(pack(samples(), max_length), n_rows):
        packed.append(row)
        on_row()
    rows = cut + packed
    if not rows:
        raise _too_short(spec, n_tokens, max_length)
    if has_documents:
        random.Random(seed).shuffle(rows)
    return rows[:n_rows]


def pack(samples: Iterable[Row], length: int) -> Iterator[Counted]:
    """Samples one after another in rows of exactly `length` tokens, as REAP packs them.

    The rule is that of https://github.com/CerebrasResearch/reap, `src/reap/data.py`: a row begins
    with a new sample; the sample that crosses its end is cut there, and what is left of it is in no
    row; the last row stays though it is not full. Attention is not masked between samples.
    REAP also leaves one masked place between two samples, which is no token and counts nowhere;
    here nothing lies between them, so that a row has a few tokens more. A last row of one token,
    which predicts nothing, is dropped. A sample is asked for only when a row is not yet full.
    """
    parts: list[Row] = []
    n_free = length
    for tokens in samples:
        if len(tokens):
            parts.append(tokens[:n_free])
            n_free -= len(parts[-1])
        if not n_free:
            yield Counted(np.concatenate(parts), len(parts))
            parts, n_free = [], length
    if length - n_free >= _SHORTEST_SAMPLE:
        yield Counted(np.concatenate(parts), len(parts))


def _too_short(spec: str, n_tokens: int, length: int) -> CalibrationError:
    return CalibrationError(
        f"calibration {spec!r}: {n_tokens:,} tokens do not fill one row of {length:,}; give more "
        "text or a smaller --max-length"
    )


def chunk_text(text: str, tokenizer: Tokenizer, chunk_size: int, where: str) -> list[Row]:
    """A text cut into consecutive chunks of exactly `chunk_size` tokens, as llama-imatrix does."""
    tokens = tokenizer.encode(text)
    cut = _cut(Passage(text, Cut.STREAM), tokens, chunk_size, tokenizer.bos)
    rows = [one.row for one in cut]
    if not rows:
        raise CalibrationError(
            f"{where}: {len(tokens):,} tokens do not fill one chunk of {chunk_size:,}; give more "
            "text or a smaller --chunk"
        )
    return rows


def _cut(passage: Passage, tokens: Row, length: int, bos: int | None) -> Iterator[Counted]:
    if passage.cut is Cut.SAMPLE:
        # a sample has its own beginning; a template writes its own BOS
        if len(tokens) >= _SHORTEST_SAMPLE:
            yield Counted(tokens[:length], 1)
        return
    for first in range(0, len(tokens), length):
        row = tokens[first : first + length].copy()
        shortest = length if passage.cut is Cut.STREAM else min(_SHORTEST_ROW, length)
        if len(row) < shortest:
            return
        if bos is not None:
            row[0] = bos  # as llama-imatrix: each chunk begins like a text
        yield Counted(row, 0)
