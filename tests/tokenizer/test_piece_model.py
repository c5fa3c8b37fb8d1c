from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
from gguf import TokenType
from hypothesis import given, settings
from hypothesis import strategies as st

from reap2gguf.errors import CheckpointError
from reap2gguf.tokenizer.piece_model import MAX_MODEL_BYTES, Piece, read_piece_model
from tests.tokenizer.small_spm import BYTES, piece_model, scores


def test_pieces_with_scores_and_types(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(piece_model())
    model = read_piece_model(path)
    assert model.pieces[:3] == [
        Piece("<unk>", 0.0, TokenType.UNKNOWN),
        Piece("<s>", 0.0, TokenType.CONTROL),
        Piece("</s>", 0.0, TokenType.CONTROL),
    ]
    assert [piece.text for piece in model.pieces[3:259]] == BYTES
    assert {piece.text: piece.score for piece in model.pieces[259:]} == scores()
    assert (model.is_bpe, model.normalizer) == (True, "identity")
    assert (model.adds_space, model.removes_spaces) == (True, False)


def test_settings_are_those_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(piece_model([("é", -1.5, 1)], 1, "nmt_nfkc", False, True))
    model = read_piece_model(path)
    assert model.pieces == [Piece("é", -1.5, TokenType.NORMAL)]
    assert (model.is_bpe, model.normalizer) == (False, "nmt_nfkc")
    assert (model.adds_space, model.removes_spaces) == (False, True)


def test_settings_that_are_left_out_are_those_of_sentencepiece(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(piece_model([("a", 0.0, 1)])[: 2 + 3 + 5])
    model = read_piece_model(path)
    assert (model.is_bpe, model.normalizer) == (False, "")
    assert (model.adds_space, model.removes_spaces) == (True, True)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "it has no pieces"),
        (b"\x0a\x05ab", "it ends inside a field"),
        (b"\x0a", "index out of range"),
        (b"\x0b\x00", "a field of the unknown kind 3"),
        (b"\xff" * 11, "more than ten bytes"),
        (b"\x08\x01", "a number where a text was expected"),
        (piece_model([("a", 0.0, 9)]), "a piece has the type 9"),
        (piece_model([("a", float("nan"), 1)]), "a piece has the score nan"),
        (b"\x0a\x03\x0a\x01\xff", "no SentencePiece model"),
    ],
)
def test_what_is_no_model_is_refused(data: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=message) as raised:
        read_piece_model(path)
    assert str(path) in str(raised.value)


SMALL = piece_model([("<unk>", 0.0, 2), ("▁a", -1.0, 1), ("<0x0A>", 0.0, 6), ("b", -2.5, 1)])


@st.composite
def spoiled(draw: st.DrawFn) -> bytes:
    """A true file with some bytes replaced, and cut."""
    data = bytearray(SMALL)
    for _ in range(draw(st.integers(1, 4))):
        data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    return bytes(data[: draw(st.integers(0, len(data)))])


@settings(max_examples=400)
@given(data=st.binary(max_size=60) | spoiled())
def test_any_bytes_are_a_model_or_refused_in_one_line(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.model"
    path.write_bytes(data)
    try:
        found = read_piece_model(path)
    except CheckpointError as error:
        message = str(error)
        assert str(path) in message
        assert message.replace(str(path), "").isprintable()
    else:
        assert 0 < len(found.pieces) <= len(data)
        assert all(math.isfinite(piece.score) for piece in found.pieces)


def test_a_file_beyond_reason_or_none(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_piece_model(path)
    os.mkfifo(path)
    with pytest.raises(CheckpointError, match="a pipe, expected a file"):
        read_piece_model(path)
    path.unlink()
    with path.open("wb") as file:
        file.truncate(MAX_MODEL_BYTES + 1)
    with pytest.raises(CheckpointError, match="67,108,865 bytes, expected at most 67,108,864"):
        read_piece_model(path)
