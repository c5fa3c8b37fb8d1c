"""A `tokenizer.json` made from the header of a GGUF file, for files that come without one.

Texts are split by llama.cpp's own patterns, merged by the merges of the header or joined by its
scores, and not normalized, as in llama.cpp. Chat templates are left out.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gguf import Keys, TokenType

from reap2gguf.atomic import write_whole
from reap2gguf.errors import ArtifactError, UnsupportedModelError
from reap2gguf.messages import shown
from reap2gguf.tokenizer.character_bpe import BYTE_TOKENS, REPLACE, SPACE
from reap2gguf.tokenizer.pre_tokenizers import (
    PRE_TOKENIZERS,
    PreTokenizer,
    pattern_for_library,
)
from reap2gguf.tokenizer.sentencepiece import SPACE_FIRST

if TYPE_CHECKING:
    from reap2gguf.gguf_files.reader import GgufHeader

_BYTE_LEVEL = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": False,
}
_MODEL = {
    "type": "BPE",
    "dropout": None,
    "unk_token": None,
    "continuing_subword_prefix": None,
    "end_of_word_suffix": None,
    "fuse_unk": False,
    "byte_fallback": False,
}
_DECODERS = [
    {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
]
_GEMMA = "gemma4"
_ADVICE = "name the checkpoint that it was made from with --reference"
_ADDED = (TokenType.CONTROL, TokenType.USER_DEFINED)


def header_tokens(header: GgufHeader) -> list[str]:
    """The text of every token. Raises ArtifactError if the header does not have them."""
    return _texts(header, Keys.Tokenizer.LIST)


def write_tokenizer(header: GgufHeader, folder: Path, advice: str = _ADVICE) -> None:
    """Write the tokenizer of a GGUF file into a folder that is there, as transformers reads it.

    `advice` is what to do without.

    Raises UnsupportedModelError for a kind of tokenizer that is neither byte-level BPE nor
    SentencePiece, or that splits text in a way that is not known; ArtifactError for a broken
    header.
    """
    contents = json.dumps(tokenizer_json(header, advice), ensure_ascii=False)
    write_whole(folder / "tokenizer.json", contents)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "backend": "tokenizers"}
    write_whole(folder / "tokenizer_config.json", json.dumps(config))


def tokenizer_json(header: GgufHeader, advice: str = _ADVICE) -> dict[str, Any]:
    """The contents of the file; raises as `write_tokenizer` does."""
    metadata, keys = header.metadata, Keys.Tokenizer
    model, pre = metadata.get(keys.MODEL), metadata.get(keys.PRE)
    is_known = model in ("llama", _GEMMA) or (model == "gpt2" and isinstance(pre, str))
    if not is_known or (model == "gpt2" and pre not in PRE_TOKENIZERS):
        raise UnsupportedModelError(
            f"{header.path}: its tokenizer is {shown(model)} with the pre-tokenizer {shown(pre)}, "
            f"expected llama, {_GEMMA}, or gpt2 with one of {', '.join(PRE_TOKENIZERS)}; {advice}"
        )
    tokens = header_tokens(header)
    types = metadata.get(keys.TOKEN_TYPE)
    if not isinstance(types, list) or len(types) != len(tokens):
        raise ArtifactError(
            f"{header.path}: {keys.TOKEN_TYPE} does not have a type for each of {len(tokens):,} "
            "tokens"
        )
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise ArtifactError(f"{header.path}: {keys.LIST} has a token twice")
    added = [
        _added(index, token, types[index] != TokenType.USER_DEFINED)
        for index, token in enumerate(tokens)
        if types[index] in _ADDED or (model == "llama" and types[index] == TokenType.UNKNOWN)
    ]
    whole = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added}
    if model == _GEMMA:
        return whole | _gemma(header, tokens, vocabulary)
    if model == "llama":
        return whole | _spm(header, tokens, types, vocabulary)
    return whole | _byte_level_bpe(header, tokens, vocabulary, PRE_TOKENIZERS[str(pre)])


def _byte_level_bpe(
    header: GgufHeader, tokens: list[str], vocabulary: dict[str, int], kind: PreTokenizer
) -> dict[str, Any]:
    """The parts that split a text into words, and merge the bytes of each."""
    return {
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [*map(_split, kind.splits), _BYTE_LEVEL],
        },
        "post_processor": _beginning(header, tokens, kind.adds_bos),
        "decoder": {**_BYTE_LEVEL, "add_prefix_space": True, "use_regex": True},
        "model": {
            **_MODEL,
            "ignore_merges": kind.ignore_merges,
            "vocab": vocabulary,
            "merges": _merges(header, vocabulary),
        },
    }


def _spm(
    header: GgufHeader, tokens: list[str], types: list[Any], vocabulary: dict[str, int]
) -> dict[str, Any]:
    """The parts that join the characters of a whole text, the best score first."""
    scores = header.metadata.get(Keys.Tokenizer.SCORES)
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise ArtifactError(
            f"{header.path}: {Keys.Tokenizer.SCORES} does not have a score for each of "
            f"{len(tokens):,} tokens"
        )
    _check_bytes(header, vocabulary)
    puts_space = header.metadata.get(Keys.Tokenizer.ADD_PREFIX, True) is True
    decoders = [
        *_DECODERS,
        *[{"type": "Strip", "content": " ", "start": 1, "stop": 0}] * puts_space,
    ]
    ordinary = {
        text: float(score)
        for text, score, kind in zip(tokens, scores, types, strict=True)
        if kind == TokenType.NORMAL
    }
    return {
        **SPACE_FIRST[puts_space],
        "post_processor": _beginning(header, tokens, True),
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            **_MODEL,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": _merges_of_scores(ordinary),
        },
    }


def _gemma(header: GgufHeader, tokens: list[str], vocabulary: dict[str, int]) -> dict[str, Any]:
    """The parts that merge the characters of each line, by ranks."""
    _check_bytes(header, vocabulary)
    return {
        "normalizer": REPLACE,
        "pre_tokenizer": _split(r"[^\n]+|\n+"),
        "post_processor": _beginning(header, tokens, True),
        "decoder": {"type": "Sequence", "decoders": _DECODERS},
        "model": {
            **_MODEL,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": _merges(header, vocabulary),
        },
    }


def _check_bytes(header: GgufHeader, vocabulary: dict[str, int]) -> None:
    if missing := [token for token in BYTE_TOKENS if token not in vocabulary]:
        raise ArtifactError(f"{header.path}: no token {missing[0]}, expected one for each byte")


def _merges_of_scores(scores: dict[str, float]) -> list[list[str]]:
    """Each way in which a token is made of two, in the order in which transformers sorts them."""
    found = [
        (score, left, right)
        for text, score in scores.items()
        for left, right in ((text[:at], text[at:]) for at in range(1, len(text)))
        if left in scores and right in scores
    ]
    found.sort(key=lambda pair: (pair[0], len(pair[1]), len(pair[2])), reverse=True)
    return [[left, right] for _, left, right in found]


def _added(index: int, text: str, special: bool) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": index, "content": text, **flags, "special": special}


def _split(pattern: str) -> dict[str, Any]:
    return {
        "type": "Split",
        "pattern": {"Regex": pattern_for_library(pattern)},
        "behavior": "Isolated",
        "invert": False,
    }


def _merges(header: GgufHeader, vocabulary: dict[str, int]) -> list[list[str]]:
    found = []
    for merge in _texts(header, Keys.Tokenizer.MERGES):
        first, _, second = merge.partition(" ")
        if not {first, second, first + second} <= vocabulary.keys():
            raise ArtifactError(
                f"{header.path}: the merge {shown(merge)} is of texts that are not tokens"
            )
        found.append([first, second])
    return found


def _beginning(header: GgufHeader, tokens: list[str], adds_bos: bool) -> dict[str, Any] | None:
    """What is put before a text: BOS, if the header says so."""
    index = header.metadata.get(Keys.Tokenizer.BOS_ID)
    if not header.metadata.get(Keys.Tokenizer.ADD_BOS, adds_bos):
        return None
    if type(index) is not int or not 0 <= index < len(tokens):
        raise ArtifactError(
            f"{header.path}: {Keys.Tokenizer.BOS_ID} is {shown(index)}, expected the id of a token"
        )
    bos = tokens[index]
    first = [{"SpecialToken": {"id": bos, "type_id": 0}}]
    texts = [{"Sequence": {"id": name, "type_id": number}} for number, name in enumerate("AB")]
    return {
        "type": "TemplateProcessing",
        "single": first + texts[:1],
        "pair": first + texts,
        "special_tokens": {bos: {"id": bos, "ids": [index], "tokens": [bos]}},
    }


def _texts(header: GgufHeader, key: str) -> list[str]:
    value = header.metadata.get(key)
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise ArtifactError(f"{header.path}: {key} is {shown(value)}, expected a list of texts")
    return value
