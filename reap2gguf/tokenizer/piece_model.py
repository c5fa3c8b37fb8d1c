"""Reads `tokenizer.model`, the file of a SentencePiece model, without the sentencepiece library.

It is a protocol buffer (sentencepiece_model.proto). Read are the pieces with their scores and
types, and the settings that change how text is split.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gguf import TokenType

from reap2gguf.errors import CheckpointError
from reap2gguf.files import TooLargeError, read_entry

MAX_MODEL_BYTES = 2**26  # the largest of real models have about 5 MB
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_BPE = 2  # TrainerSpec.ModelType
# SentencePiece.Type; the numbers are those of llama.cpp's token types
_TYPES = frozenset(TokenType)


@dataclass(frozen=True)
class Piece:
    """One token of a SentencePiece model."""

    text: str
    score: float
    type: TokenType


@dataclass(frozen=True)
class PieceModel:
    """A SentencePiece model: its pieces by id, and its settings."""

    pieces: list[Piece]
    is_bpe: bool
    normalizer: str  # `identity` changes nothing
    adds_space: bool  # a space is put before each text
    removes_spaces: bool  # of several spaces one is left


def read_piece_model(path: Path) -> PieceModel:
    """The model in a file. Raises CheckpointError if it is not one."""
    try:
        return _model(read_entry(path, MAX_MODEL_BYTES))
    except (OSError, TooLargeError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from error
    except (ValueError, struct.error, IndexError) as error:
        raise CheckpointError(f"{path}: no SentencePiece model ({error})") from error


def _model(data: bytes) -> PieceModel:
    pieces: list[Piece] = []
    trainer, normalizer = b"", b""
    for number, value in _fields(data):
        if number == 1:
            pieces.append(_piece(_as_bytes(value)))
        elif number == 2:
            trainer = _as_bytes(value)
        elif number == 3:
            normalizer = _as_bytes(value)
    if not pieces:
        raise ValueError("it has no pieces")
    settings = dict(_fields(normalizer))
    return PieceModel(
        pieces,
        is_bpe=dict(_fields(trainer)).get(3, 1) == _BPE,
        normalizer=_as_bytes(settings.get(1, b"")).decode(),
        adds_space=settings.get(3, 1) != 0,
        removes_spaces=settings.get(4, 1) != 0,
    )


def _piece(data: bytes) -> Piece:
    fields = dict(_fields(data))
    score, kind = fields.get(2, b"\0\0\0\0"), fields.get(3, 1)
    if kind not in _TYPES:
        raise ValueError(f"a piece has the type {kind!r}")
    value = struct.unpack("<f", _as_bytes(score))[0]
    if not math.isfinite(value):
        raise ValueError(f"a piece has the score {value}")
    return Piece(_as_bytes(fields.get(1, b"")).decode(), value, TokenType(int(kind)))


def _as_bytes(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise ValueError("a number where a text was expected")
    return value


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a message: number, and a number or bytes. Raises ValueError if it is cut."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        value: int | bytes
        if kind == _VARINT:
            value, at = _varint(data, at)
        else:
            if kind == _BYTES:
                size, at = _varint(data, at)
            elif kind in (_FIXED32, _FIXED64):
                size = 4 if kind == _FIXED32 else 8
            else:
                raise ValueError(f"a field of the unknown kind {kind}")
            if at + size > len(data):
                raise ValueError("it ends inside a field")
            value, at = data[at : at + size], at + size
        yield key >> 3, value


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number of seven bits a byte, and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        value |= (data[at] & 0x7F) << shift
        at += 1
        if not data[at - 1] & 0x80:
            return value, at
    raise ValueError("a number of more than ten bytes")
