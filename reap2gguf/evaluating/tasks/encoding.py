"""Requests of lm-eval as rows of tokens, cut as its model `hf` cuts them.

A request for the log-likelihood of a continuation is one row: context and continuation, of which
the continuation is scored. Both are encoded together and divided by the length of the context's
own tokens; a row that is too long loses its beginning. A request for the log-likelihood of a whole
text is divided into windows, in which each token is scored once, with as much before it as fits.
lm-eval's own functions do this; what its `hf` model adds (special tokens, and the length of a
context) is written here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from reap2gguf.checkpoint.config import read_json
from reap2gguf.errors import CheckpointError, EvaluationError
from reap2gguf.evaluating.scores import ScoredRow
from reap2gguf.messages import shown
from reap2gguf.tokenizer.in_transformers import load_in_transformers
from reap2gguf.tokenizer.panics import panics_as

if TYPE_CHECKING:
    from reap2gguf.artifacts.texts import Row

Request = Any  # lm_eval.api.instance.Instance
Key = tuple[str, tuple[str, ...]]  # what is asked, and the texts
_LENGTH_KEYS = ("n_positions", "max_position_embeddings", "n_ctx")
_LONGEST = 2**31
_NO_LIMIT = 10**18  # tokenizers say a larger number where they know of no length
_CONTEXTS = 64  # whose tokens are kept: the answers of a question follow each other


@dataclass
class Encoded:
    """Rows without repetitions, and which of them answer a request.

    Memory: 8 bytes per token of all rows, and 200 per request.
    """

    rows: list[ScoredRow] = field(default_factory=list)
    answers: dict[Key, tuple[int, ...]] = field(default_factory=dict)  # numbers of rows
    n_requests: int = 0
    n_cut: int = 0  # requests whose beginning does not fit
    _numbers: dict[tuple[int, bytes], int] = field(default_factory=dict)

    @property
    def n_tokens(self) -> int:
        return sum(len(row.tokens) for row in self.rows)

    def add(self, row: ScoredRow) -> int:
        """The number of a row, which is kept once."""
        key = row.first, _digest(row.tokens)
        number = self._numbers.setdefault(key, len(self.rows))
        if number == len(self.rows):
            self.rows.append(row)
        return number

    def sort(self) -> None:
        """Order rows by length, and those together that differ in the last token alone."""
        order = sorted(range(len(self.rows)), key=lambda number: _place(self.rows[number]))
        places = {number: place for place, number in enumerate(order)}
        self.rows = [self.rows[number] for number in order]
        for key, numbers in self.answers.items():
            self.answers[key] = tuple(places[number] for number in numbers)
        self._numbers = {}


def _place(row: ScoredRow) -> tuple[int, bytes, int, int]:
    """A digest in place of the tokens, so that sorting takes no memory for a copy of them."""
    return len(row.tokens), _digest(row.tokens[:-1]), int(row.tokens[-1]), row.first


def _digest(tokens: Row) -> bytes:
    return hashlib.blake2b(tokens.tobytes(), digest_size=16).digest()


def key_of(request: Request) -> Key:
    """What a request asks for: two requests with one key have the same answer."""
    return request.request_type, tuple(request.args)


def encoder_of(folder: Path, max_length: int | None) -> Any:
    """A model of lm-eval that only encodes, with the tokenizer of a checkpoint's folder.

    `max_length`: tokens before the last one of a row; None for what the config says. Raises
    CheckpointError if the folder has no tokenizer that transformers can load.
    """
    tokenizer = load_in_transformers(folder)
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise CheckpointError(
            f"{folder}: the tokenizer has no token for the beginning or end of a text, and tasks "
            "begin with one; add eos_token to tokenizer_config.json"
        )
    return _encoder_class()(tokenizer, max_length or _length_of(folder, tokenizer))


def _length_of(folder: Path, tokenizer: Any) -> int:
    """The length of a model's context, found where lm-eval finds it."""
    from lm_eval.defaults import DEFAULT_MAX_LENGTH

    config = read_json(folder / "config.json")
    values: Mapping[str, Any] = config
    for key in ("thinker_config", "text_config"):
        values = part if isinstance(part := values.get(key), dict) else values
    found = next((values[key] for key in _LENGTH_KEYS if values.get(key) is not None), None)
    if found is None:
        length = getattr(tokenizer, "model_max_length", None)
        found = length if length is not None and length < _NO_LIMIT else DEFAULT_MAX_LENGTH
    if type(found) is not int or not 2 <= found < _LONGEST:
        raise CheckpointError(
            f"{folder / 'config.json'}: the context has {shown(found)} tokens, expected a count"
        )
    return found


class _Encoder:
    """lm-eval's model without a model: its `loglikelihood` returns contexts and continuations.

    These are the methods that `TemplateLM`, which divides texts, wants of a model; here is what
    `hf` does with special tokens.
    """

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.max_length = max_length
        self._prefix_text = tokenizer.decode(self.prefix_token_id)
        self._encoded = lru_cache(_CONTEXTS)(self._encode)

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return int(bos) if bos is not None else self.eot_token_id

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        # a text that begins with the token already gets no second one
        if add_special_tokens is None and string.startswith(self._prefix_text):
            add_special_tokens = False
        return list(self._encoded(string, add_special_tokens))

    def _encode(self, text: str, adds: bool | None) -> list[int]:
        options = {} if adds is None else {"add_special_tokens": adds}
        with panics_as(EvaluationError, f"the tokenizer fails on {shown(text)}"):
            return list(self.tokenizer.encode(text, **options))

    def _loglikelihood_tokens(self, requests: list[Any], **_: Any) -> list[Any]:
        return [(context, continuation) for _, context, continuation in requests]

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> list[Any]:
        """Windows of each text: pairs of a context and what is scored after it."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        return [
            [
                make_disjoint_window(window)
                for window in get_rolling_token_windows(
                    token_list=self.tok_encode(request.args[0]),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length,
                    context_len=1,
                )
            ]
            for request in requests
        ]

    def generate_until(self, requests: Any, disable_tqdm: bool = True) -> list[str]:
        raise EvaluationError("a streamed evaluation cannot generate text")


@cache
def _encoder_class() -> type[Any]:
    """The encoder as a model of lm-eval, made when it is needed: the library is optional."""
    from lm_eval.api.model import TemplateLM

    return type("Encoder", (_Encoder, TemplateLM), {})


def encode(encoder: Any, name: str, requests: Iterable[Request], into: Encoded) -> int:
    """Add the rows of a task's requests; how many of them had to be cut.

    Raises EvaluationError for a request that lm-eval's `hf` could not answer either.
    """
    n_cut = 0
    for request in requests:
        into.n_requests += 1
        _check(name, request)
        key = key_of(request)
        if key in into.answers:
            continue
        rows = []
        for context, continuation in _pairs(encoder, request):
            n_cut += len(context) + len(continuation) > encoder.max_length + 1
            rows.append(into.add(_row(encoder, name, request, context, continuation)))
        into.answers[key] = tuple(rows)
    into.n_cut += n_cut
    return n_cut


def _check(name: str, request: Request) -> None:
    kind, texts = request.request_type, request.args
    if kind not in ("loglikelihood", "loglikelihood_rolling"):
        raise EvaluationError(f"{name}: asks for {shown(kind)}, expected log-likelihoods")
    if not all(isinstance(text, str) for text in texts):
        raise EvaluationError(f"{name}: asks about {shown(texts)}, expected texts")
    if kind == "loglikelihood" and not texts[1]:
        raise EvaluationError(f"{name}: an answer to {_end(request)} is empty; correct the task")


def _pairs(encoder: Any, request: Request) -> Any:
    """Contexts and continuations of one request."""
    if request.request_type == "loglikelihood_rolling":
        return encoder.loglikelihood_rolling([request])[0]
    return encoder.loglikelihood([request], disable_tqdm=True)


def _row(
    encoder: Any, name: str, request: Request, context: Sequence[int], continuation: Sequence[int]
) -> ScoredRow:
    if not context or not continuation:
        which = "answer" if context else "question"
        raise EvaluationError(
            f"{name}: the {which} at {_end(request)} has no tokens of its own; correct the task"
        )
    if len(continuation) > encoder.max_length:
        raise EvaluationError(
            f"{name}: an answer at {_end(request)} has {len(continuation):,} tokens, expected at "
            f"most {encoder.max_length:,}, the length of the model's context"
        )
    tokens = np.array([*context, *continuation][-(encoder.max_length + 1) :], dtype=np.int64)
    return ScoredRow(tokens, len(tokens) - len(continuation))


def _end(request: Request) -> str:
    """The end of a question, to find it by."""
    return shown(request.args[0][-80:])
