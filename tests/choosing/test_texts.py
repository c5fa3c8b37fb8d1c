"""The texts that candidates are measured on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from reap2gguf.calibration.spec import decide
from reap2gguf.choosing.amounts import MOST_CHUNKS
from reap2gguf.choosing.texts import (
    EMBEDDED,
    EMBEDDED_LABEL,
    held_out_text,
    other_text,
    scored_half,
)
from reap2gguf.errors import CalibrationError
from reap2gguf.options import CalibrationOptions
from reap2gguf.tokenizer.tokenizer import Tokenizer
from tests.tiny import EXAMPLE, REPOSITORY

CODE = decide(CalibrationOptions(str(REPOSITORY / "calibration" / "code.txt")))
VOCABULARY = 10**6


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(EXAMPLE)


@pytest.mark.parametrize(
    ("length", "first", "n_scored"), [(2, 1, 1), (3, 2, 1), (4, 3, 1), (512, 257, 255), (9, 5, 4)]
)
def test_the_second_half_is_scored_but_for_its_first_token(
    length: int, first: int, n_scored: int
) -> None:
    row = scored_half(np.arange(length))
    assert (row.first, row.n_scored) == (first, n_scored)


def test_held_out_rows_are_scored_as_they_are() -> None:
    found = held_out_text("mine.txt", [np.arange(8), np.arange(5)])
    assert found.label == "held-out rows of mine.txt"
    assert [len(row.tokens) for row in found.rows] == [8, 5]
    assert found.sha256 != held_out_text("mine.txt", [np.arange(8)]).sha256


def test_the_embedded_text_has_a_share_of_every_domain(tokenizer: Tokenizer) -> None:
    found = other_text(None, CODE, tokenizer, VOCABULARY, 512)
    assert found is not None
    assert found.label == EMBEDDED_LABEL
    folder = REPOSITORY / "calibration"
    for name in EMBEDDED:
        tokens = tokenizer.encode((folder / name).read_text()).tolist()
        chunks = [tokens[first : first + 512] for first in range(0, len(tokens) - 511, 512)]
        of_it = [row for row in found.rows if row.tokens.tolist() in chunks]
        assert len(of_it) == min(len(chunks), MOST_CHUNKS // len(EMBEDDED))


def test_it_is_no_other_text_where_it_is_the_calibration(tokenizer: Tokenizer) -> None:
    assert other_text(None, decide(CalibrationOptions()), tokenizer, VOCABULARY, 512) is None


def test_a_file_takes_its_place(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("Some words of another kind. " * 400)
    default = decide(CalibrationOptions())
    found = other_text(path, default, tokenizer, VOCABULARY, 32)
    assert found is not None
    assert (found.label, len(found.rows)) == ("mine.txt", MOST_CHUNKS)
    with pytest.raises(CalibrationError, match=r"mine.txt: the tokenizer gives id .* is 5;"):
        other_text(path, default, tokenizer, 5, 32)
    path.write_text("Some words. " * 40)
    with pytest.raises(CalibrationError, match=r"mine.txt: 1 chunk of .* --choose-text"):
        other_text(path, default, tokenizer, VOCABULARY, len(tokenizer.encode(path.read_text())))
