"""A SentencePiece vocabulary as a GGUF header stores it: tokens, scores and types.

llama.cpp's `llama` tokenizer joins the two neighbours whose token has the best score. A
`tokenizer.json` of such a model is BPE on characters, with tokens for bytes, and its merges stand
in the order of the scores. Where `tokenizer.model` lies beside it, scores and types are those that
llama.cpp's converter takes from it. Without one the converter gives every token the same score, by
which llama.cpp makes other ids; here the scores are the order of the merges.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gguf import TokenType

from reap2gguf.errors import CheckpointError, UnsupportedModelError
from reap2gguf.messages import shown
from reap2gguf.models.description import MAX_VOCABULARY
from reap2gguf.tokenizer.added_tokens import AddedToken, added_type, read_added_tokens
from reap2gguf.tokenizer.advice import RESAVE_ALL
from reap2gguf.tokenizer.character_bpe import (
    BYTE_TOKENS,
    MODEL_SETTINGS,
    REPLACE,
    SPACE,
    checked_vocab,
)
from reap2gguf.tokenizer.merges import checked_merges
from reap2gguf.tokenizer.piece_model import Piece, read_piece_model
from reap2gguf.tokenizer.settings import check_settings, unknown
from reap2gguf.tokenizer.special_names import SPECIAL_BY_NAME
from reap2gguf.tokenizer.steps import steps_of

if TYPE_CHECKING:
    from reap2gguf.tokenizer.merges import Merge

_ADDED_SCORE, _UNUSED_SCORE = -1000.0, -10000.0  # as llama.cpp's converter
_PREPEND = {"type": "Prepend", "prepend": SPACE}
# the parts of a tokenizer.json that put a space before each text as llama.cpp does, or none
SPACE_FIRST: dict[bool, dict[str, Any]] = {
    put: {
        "normalizer": {"type": "Sequence", "normalizers": [_PREPEND] * put + [REPLACE]},
        "pre_tokenizer": None,
    }
    for put in (True, False)
}
_METASPACE = {"replacement": (SPACE,), "split": (False,)}


@dataclass(frozen=True)
class SpmVocabulary:
    """What a GGUF header stores of a SentencePiece tokenizer: a text, type and score per id.

    Attributes:
        space_prefix: Whether a space is put before a text.
        prepends_always: Whether also before a text that begins with a space, as llama.cpp does.
        prepends_after_special: Whether also after each special token, as llama.cpp does.
    """

    tokens: list[str]
    types: list[TokenType]
    scores: list[float]
    added: list[AddedToken]
    space_prefix: bool
    prepends_always: bool
    prepends_after_special: bool


def read_spm(
    tokenizer: dict[str, Any], folder: Path, config: dict[str, Any], vocab_size: int
) -> SpmVocabulary:
    """The vocabulary of the files in `folder`; `config` is its tokenizer_config.json.

    Raises UnsupportedModelError for a form that llama.cpp does not reproduce, and CheckpointError
    for files that are broken or disagree.
    """
    path = folder / "tokenizer.json"
    prefix, always, after_special = _form(tokenizer, path)
    added = read_added_tokens(tokenizer, path)
    check_size(vocab_size, folder)
    vocab = checked_vocab(tokenizer, added, vocab_size, path)
    model = folder / "tokenizer.model"
    if model.is_file():
        pieces = _pieces_of_model(model, prefix)
    else:
        pieces = _pieces_of_merges(tokenizer, added, vocab, path)
    tokens = [f"[PAD{index}]" for index in range(vocab_size)]
    types, scores = [TokenType.UNUSED] * vocab_size, [_UNUSED_SCORE] * vocab_size
    for index, piece in enumerate(pieces[:vocab_size]):
        tokens[index], types[index], scores[index] = piece.text, piece.type, piece.score
    described = config.get("added_tokens_decoder")
    for token in added:
        # the converter looks at the added tokens of the files beside tokenizer.json alone
        is_new = types[token.index] == TokenType.UNUSED
        if is_new or (isinstance(described, dict) and str(token.index) in described):
            types[token.index], scores[token.index] = added_type(token), _ADDED_SCORE
            is_shown = types[token.index] == TokenType.USER_DEFINED
            tokens[token.index] = token.text.replace(SPACE, " ") if is_shown else token.text
    _check_same(tokens, types, vocab, added, path)
    return SpmVocabulary(tokens, types, scores, added, prefix, always, after_special)


def check_size(vocab_size: int, folder: Path) -> None:
    """Refuse a number of ids that no model has, before a list of them is made."""
    if vocab_size > MAX_VOCABULARY:
        raise UnsupportedModelError(
            f"{folder}: vocab_size {vocab_size:,} is over {MAX_VOCABULARY:,}"
        )


def _form(tokenizer: dict[str, Any], path: Path) -> tuple[bool, bool, bool]:
    """Compare the parts; whether a space is put first, always, and after special tokens."""
    unread = ("vocab", "merges", "unk_token")
    model = {key: value for key, value in tokenizer["model"].items() if key not in unread}
    check_settings(model, MODEL_SETTINGS, "BPE", path, "model")
    normalizers = steps_of(tokenizer.get("normalizer"), "normalizers")
    part = tokenizer.get("pre_tokenizer")
    if normalizers:
        if part is not None:
            raise unknown(path, "pre_tokenizer", part, "none beside a normalizer")
        if normalizers not in ([_PREPEND, REPLACE], [REPLACE]):
            expected = f"spaces replaced by {SPACE}, with one before a text or without"
            raise unknown(path, "normalizer", tokenizer["normalizer"], expected)
        return _PREPEND in normalizers, True, True
    scheme = part.get("prepend_scheme") if isinstance(part, dict) else None
    settings = _METASPACE | {"prepend_scheme": ("always", "first", "never")}
    check_settings(part, settings, "Metaspace", path, "pre_tokenizer")
    return scheme != "never", scheme == "never", scheme != "first"


def _pieces_of_model(path: Path, space_prefix: bool) -> list[Piece]:
    """The pieces of `tokenizer.model`, if it joins characters as llama.cpp does."""
    model = read_piece_model(path)
    expected = f"a BPE model that changes no text; {RESAVE_ALL}"
    if not model.is_bpe or model.normalizer != "identity" or model.removes_spaces:
        found = "BPE" if model.is_bpe else "no BPE"
        spaces = ", and leaves out spaces" if model.removes_spaces else ""
        raise UnsupportedModelError(
            f"{path}: {found}, normalizes by {shown(model.normalizer)}{spaces}, expected {expected}"
        )
    if model.adds_space is not space_prefix:
        raise CheckpointError(
            f"{path}: puts {'a' if model.adds_space else 'no'} space before a text, expected what "
            f"tokenizer.json does; {RESAVE_ALL}"
        )
    return model.pieces


def _pieces_of_merges(
    tokenizer: dict[str, Any], added: list[AddedToken], vocab: dict[str, int], path: Path
) -> list[Piece]:
    """Pieces scored by the order of the merges, with the types of a SentencePiece model."""
    order = _order(checked_merges(tokenizer, vocab, path))
    unk = tokenizer["model"].get("unk_token")
    special = {token.text for token in added if token.special}
    by_id = {index: text for text, index in vocab.items()}
    pieces = []
    for index in range(max(by_id) + 1):
        text = by_id.get(index, f"[PAD{index}]")
        kind = TokenType.NORMAL if index in by_id else TokenType.UNUSED
        if text in BYTE_TOKENS:
            kind = TokenType.BYTE
        elif text == unk:
            kind = TokenType.UNKNOWN
        elif text in special:
            kind = TokenType.CONTROL
        # a character has no merge; its score is never looked at
        score = 0.0 if kind != TokenType.NORMAL else -float(order.get(text, len(order) + index))
        pieces.append(Piece(text, score, kind))
    return pieces


def _order(merges: list[Merge]) -> dict[str, int]:
    """The place of each token among those that merges make; some share one.

    Of equal scores transformers sorts the merges by their lengths, so those of one token can stand
    among those of others: all of these have one place.
    """
    last = {left + right: rank for rank, (left, right) in enumerate(merges)}
    order: dict[str, int] = {}
    place, end = -1, -1
    for rank, (left, right) in enumerate(merges):
        text = left + right
        if text not in order:
            if rank > end:
                place += 1
            order[text] = place
        end = max(end, last[text])
    return order


def _check_same(
    tokens: list[str],
    types: list[TokenType],
    vocab: dict[str, int],
    added: list[AddedToken],
    path: Path,
) -> None:
    """Refuse tokens that are not those of tokenizer.json, or that llama.cpp cannot load."""
    expected = {index: text for text, index in vocab.items()}
    expected |= {token.index: token.text for token in added}
    ids: dict[str, int] = {}
    for index, text in enumerate(tokens):
        wanted = expected.get(index, f"[PAD{index}]")
        if text not in (wanted, wanted.replace(SPACE, " ")):
            raise CheckpointError(
                f"{path.parent}: token {index} is {shown(text)} by tokenizer.model and "
                f"{shown(wanted)} by tokenizer.json, expected the same; {RESAVE_ALL}"
            )
        if not text or ids.setdefault(text, index) != index:
            raise UnsupportedModelError(
                f"{path}: ids {ids.get(text, index)} and {index} have the text {shown(text)}, "
                f"expected one id per text: llama.cpp ends when it loads others; {RESAVE_ALL}"
            )
        if types[index] == TokenType.NORMAL and text in SPECIAL_BY_NAME:
            raise UnsupportedModelError(
                f"{path}: token {shown(text)} with the id {index} is an ordinary token here, and a "
                f"special one for llama.cpp, expected it among the added_tokens; {RESAVE_ALL}"
            )
