"""A checkpoint's tokenizer and chat template, for calibration.

The chat template is what transformers loads; token ids are those of `tokenizer.json`, from which
the GGUF file gets its tokenizer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from reap2gguf.errors import CalibrationError, CheckpointError
from reap2gguf.tokenizer.first_token import forced_bos
from reap2gguf.tokenizer.in_transformers import load_in_transformers
from reap2gguf.tokenizer.panics import panics_as
from reap2gguf.tokenizer.pieces import PIECE, cuts_anywhere, next_cut, pieces
from reap2gguf.tokenizer.templates import ChatTemplate
from reap2gguf.tokenizer.tokenizer_files import load_library, tokenizer_path

TokenIds = npt.NDArray[np.int64]
_GROUP = 2**20  # characters that the library gets at once: enough for all processors
_LETTERS_PER_TOKEN = 6  # more than most texts have, so that few are read in two steps
_FEWEST_PER_TOKEN = 2  # of a long text, which is read in several steps, and little in vain


class Tokenizer:
    """A checkpoint's tokenizer: texts to token ids, conversations to texts.

    Raises CheckpointError if the checkpoint has no usable tokenizer.
    """

    def __init__(self, folder: Path) -> None:
        loaded = load_in_transformers(folder)
        if not loaded.is_fast or not tokenizer_path(folder).is_file():
            raise CheckpointError(f"{folder}: has no tokenizer.json (a fast tokenizer is needed)")
        # the GGUF file is made of tokenizer.json; classes of transformers may do otherwise
        self._encoder = load_library(folder)
        with panics_as(CheckpointError, f"{folder}: no usable tokenizer"):
            self._in_pieces = cuts_anywhere(self._encoder)
            # what the tokenizer puts before each text: one BOS token or nothing
            prefix = self._encoder.encode("").ids
            forced = None if prefix else forced_bos(folder)
            first = None if forced is None else self._encoder.token_to_id(forced)
        self.bos: int | None = prefix[0] if prefix else first
        self._chat = _chat_template(loaded, folder)

    def encode(self, text: str, at_least: int | None = None) -> TokenIds:
        """Token ids of a text, shape (n,). Special tokens in it are recognised, none is added.

        With `at_least`, a long text is read only until there are so many tokens; they may be a few
        more. All processors work on a long text (`pieces.py`). Memory, besides the ids: about 200
        bytes for each token of two million characters.
        """
        if len(text) <= PIECE:
            return self._batch([text])[0]
        return next(self.encode_all([text], at_least))

    def encode_all(self, texts: Iterable[str], at_least: int | None = None) -> Iterator[TokenIds]:
        """Token ids of each text, in order, as `encode` gives them; texts are prefetched."""
        if not self._in_pieces:
            # each text of its own: the library keeps the tokens of a group in memory
            yield from (self._batch([text])[0] for text in texts)
            return
        most = None if at_least is None else at_least * _LETTERS_PER_TOKEN
        if at_least is not None and most is not None and most > _GROUP:
            most = max(_GROUP, at_least * _FEWEST_PER_TOKEN)
        parts: list[TokenIds] = []
        for rest, ids in _read_ahead(self._batch, _grouped(texts, most)):
            parts.append(ids)
            if rest is None:
                continue  # more pieces of this text follow
            n_tokens = sum(map(len, parts))
            if rest and at_least is not None and n_tokens < at_least:
                parts.extend(self.encode_all([rest], at_least - n_tokens))
            yield parts[0] if len(parts) == 1 else np.concatenate(parts)
            parts = []

    def _batch(self, texts: list[str]) -> list[TokenIds]:
        """Token ids of some texts, made by the library's own threads."""
        with panics_as(CalibrationError, "the tokenizer fails on the calibration text"):
            found = self._encoder.encode_batch_fast(texts, add_special_tokens=False)
        return [np.asarray(one.ids, dtype=np.int64) for one in found]

    def next_cut(self, text: str, position: int) -> int | None:
        """The first place at or after `position` from which ids are those of the whole text.

        The end of the text where there is none; None if this is not known of the tokenizer.
        """
        return next_cut(text, position) if self._in_pieces else None

    @property
    def has_template(self) -> bool:
        """Whether the checkpoint has a chat template."""
        return self._chat is not None

    def decode(self, tokens: Sequence[int], skip_special: bool = False) -> str:
        """The text of token ids, with special ones or without."""
        with panics_as(CheckpointError, "the tokenizer fails on token ids"):
            return self._encoder.decode(list(tokens), skip_special_tokens=skip_special)

    def render_chat(
        self,
        messages: list[Mapping[str, Any]],
        tools: list[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
    ) -> str:
        """Messages as the model's chat template writes them, in a process of its own.

        Without a template, the contents of the messages, one per line. Raises CalibrationError if
        the template refuses the messages or exceeds a limit.
        """
        if self._chat is None:
            return "\n".join(_text_of(message["content"]) for message in messages)
        return self._chat.render(messages, tools, add_generation_prompt=add_generation_prompt)

    def reads_parts(self) -> bool:
        """Whether the template reads content that is a list of parts, such as text and images."""
        return self._chat is not None and self._chat.reads_parts()

    def names_role(self, role: str) -> bool:
        """Whether the template knows a role by its name; without a template, all are the same."""
        return self._chat is None or self._chat.names_role(role)

    def close(self) -> None:
        """End the process that renders; a later rendering starts another."""
        if self._chat is not None:
            self._chat.close()


# A piece, and what follows it: None for more pieces of the same text; else the part of the text
# that was not asked for, which is empty as a rule.
_Piece = tuple[str, str | None]


def _grouped(texts: Iterable[str], most: int | None) -> Iterator[list[_Piece]]:
    """The pieces of all texts, of each as many as have `most` characters, in groups."""
    group: list[_Piece] = []
    n_characters = 0
    for piece in chain.from_iterable(_pieces_of(text, most) for text in texts):
        group.append(piece)
        n_characters += len(piece[0])
        if n_characters >= _GROUP:
            yield group
            group, n_characters = [], 0
    if group:
        yield group


def _pieces_of(text: str, most: int | None) -> Iterator[_Piece]:
    n_done = 0
    for piece in pieces(text, PIECE if most is None else min(PIECE, most)):
        n_done += len(piece)
        is_enough = most is not None and n_done >= most
        is_last = is_enough or n_done == len(text)
        yield piece, text[n_done:] if is_last else None
        if is_last:
            return


def _read_ahead(
    encode: Callable[[list[str]], list[TokenIds]], groups: Iterable[list[_Piece]]
) -> Iterator[tuple[str | None, TokenIds]]:
    """What follows each piece, and its ids; a group is encoded while the one before is used."""
    with ThreadPoolExecutor(1, "tokenizing") as pool:
        before: tuple[list[_Piece], Future[list[TokenIds]]] | None = None
        for group in chain(groups, [None]):
            job = None if group is None else pool.submit(encode, [piece for piece, _ in group])
            if before is not None:
                pieces_before, done = before
                for (_, rest), ids in zip(pieces_before, done.result(), strict=True):
                    yield rest, ids
            before = None if group is None or job is None else (group, job)


def _chat_template(tokenizer: Any, folder: Path) -> ChatTemplate | None:
    templates = tokenizer.chat_template
    if templates is None:
        return None
    texts = templates.values() if isinstance(templates, dict) else [templates]
    if not all(isinstance(text, str) for text in texts):
        raise CheckpointError(f"{folder}: its chat template is not text")
    return ChatTemplate(templates, tokenizer.special_tokens_map)


def _text_of(content: Any) -> str:
    """The text of a message: a string, or the texts among its parts."""
    if not isinstance(content, list):
        return "" if content is None else str(content)
    texts = [part.get("text") if isinstance(part, dict) else part for part in content]
    return "".join(text for text in texts if isinstance(text, str))
