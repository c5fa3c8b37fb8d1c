"""Texts far longer than needed are read in parts, and their tokens are those of the whole."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from reap2gguf.artifacts.texts import NOT_COUNTED, Texts
from reap2gguf.calibration import stretches
from reap2gguf.calibration.drawing import imatrix_chunks, read_texts
from reap2gguf.calibration.rows import make_rows
from reap2gguf.calibration.sources import Corpus, Cut, Passage
from reap2gguf.calibration.spec import decide
from reap2gguf.calibration.stretches import is_far_longer, spread_rows
from reap2gguf.options import CalibrationOptions
from reap2gguf.resources import shipped_folder
from reap2gguf.tokenizer.tokenizer import TokenIds, Tokenizer
from tests.tiny import EXAMPLE


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(EXAMPLE)


@pytest.fixture(scope="module")
def text() -> str:
    files = sorted(shipped_folder("calibration").glob("*.txt"))
    return "\n".join(file.read_text(encoding="utf-8") for file in files)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let texts of this size count as long."""
    monkeypatch.setattr(stretches, "SHORT_TEXT", 1000)


def place(row: TokenIds, tokens: TokenIds) -> int:
    """Where a row lies in the tokens of the whole text."""
    for start in np.flatnonzero(tokens == row[0]):
        if np.array_equal(tokens[start : start + len(row)], row):
            return int(start)
    raise AssertionError("no part of the text has these tokens")


def test_what_is_far_longer() -> None:
    assert not is_far_longer(2**24, 1)
    assert is_far_longer(2**24 + 1, 1)
    assert not is_far_longer(40_000_000, 2**22)
    assert is_far_longer(40_000_000, 2**21)


@pytest.mark.parametrize(("n_rows", "length"), [(1, 64), (40, 64), (90, 16)])
def test_rows_are_parts_of_the_whole(
    tokenizer: Tokenizer, text: str, n_rows: int, length: int
) -> None:
    tokens = tokenizer.encode(text)
    for seed in range(3):
        rows = spread_rows(text, tokenizer, n_rows, (length, length), random.Random(seed))
        assert rows is not None
        assert [len(row) for row in rows] == [length] * n_rows
        places = [place(row, tokens) for row in rows]
        assert all(b - a >= length for a, b in pairwise(places)), "no overlap"
        assert places[-1] >= len(tokens) * (n_rows - 1) // n_rows - 2000, "to the end of the text"


def test_the_seed_draws(tokenizer: Tokenizer, text: str) -> None:
    def drawn(seed: int) -> list[list[int]]:
        rows = spread_rows(text, tokenizer, 8, (64, 64), random.Random(seed))
        return [row.tolist() for row in rows or ()]

    assert drawn(1) == drawn(1) != drawn(2)


def test_where_a_stretch_has_too_few_tokens(
    tokenizer: Tokenizer, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert spread_rows("-" * 50_000 + text, tokenizer, 9, (64, 64), random.Random(1)) is None
    monkeypatch.setattr(tokenizer, "_in_pieces", False)
    assert spread_rows(text, tokenizer, 9, (64, 64), random.Random(1)) is None


@pytest.mark.usefixtures("short")
def test_chunks_of_a_long_text(
    tokenizer: Tokenizer, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "long.txt"
    path.write_text(text)
    read = counted(tokenizer, monkeypatch)
    found = imatrix_chunks(tokenizer, path, 64, None, 9, 42)
    assert len(found.chunks) == 9
    assert found.n_of_text == NOT_COUNTED
    assert found.summary == "9 chunks of 64 tokens, spread over a text that is far longer"
    assert found.text == text, "the whole text is kept, since the bundle has it"
    assert next(read) < len(text) / 10
    Texts(None, found, {}).save(tmp_path / "texts.safetensors")
    kept = Texts.load(tmp_path / "texts.safetensors").chunks
    assert kept is not None
    assert (kept.n_of_text, kept.tokens_sha256) == (NOT_COUNTED, found.tokens_sha256)
    every = imatrix_chunks(tokenizer, path, 64)
    assert len(every.chunks) == every.n_of_text > 100
    hard = tmp_path / "hard.txt"
    hard.write_text("-" * 50_000 + text)
    assert imatrix_chunks(tokenizer, hard, 64, None, 9, 42).n_of_text > 100


def counted(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """How many characters the tokenizer has read since it was last asked."""
    sizes: list[int] = []
    encode = tokenizer._batch

    def batch(group: list[str]) -> list[TokenIds]:
        sizes.extend(map(len, group))
        return encode(group)

    monkeypatch.setattr(tokenizer, "_batch", batch)

    def totals() -> Iterator[int]:
        while True:
            total = sum(sizes)
            sizes.clear()
            yield total

    return totals()


@pytest.mark.usefixtures("short")
def test_documents_far_longer_than_the_rows(
    tokenizer: Tokenizer, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [text[:9000], text[9000:80_000], "x", text[80_000:]]
    corpus = Corpus("s", tuple(Passage(one, Cut.DOCUMENT) for one in texts))
    read = counted(tokenizer, monkeypatch)
    rows = [row.tokens for row in make_rows(corpus, tokenizer, 64, 40, 42)]
    assert next(read) < len(text) / 2
    assert len(rows) == 40
    tokens = tokenizer.encode(text)
    first, last = (len(tokenizer.encode(text[:end])) for end in (9000, 80_000))
    of_second = sum(first <= place(row, tokens) < last for row in rows)
    assert abs(of_second - 40 * 71_000 / len(text)) <= 2
    again = [row.tokens for row in make_rows(corpus, tokenizer, 64, 40, 42)]
    assert all(np.array_equal(a, b) for a, b in zip(rows, again, strict=True))
    other = [row.tokens for row in make_rows(corpus, tokenizer, 64, 40, 43)]
    assert not all(np.array_equal(a, b) for a, b in zip(rows, other, strict=True))


def test_a_stream_gives_its_first_rows_and_is_read_no_further(
    tokenizer: Tokenizer, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = Corpus("s", (Passage(text, Cut.STREAM),))
    read = counted(tokenizer, monkeypatch)
    rows = make_rows(corpus, tokenizer, 32, 9, 42)
    assert next(read) < 32 * 9 * 7 + 2000
    every = make_rows(corpus, tokenizer, 32, None, 42)
    assert next(read) == len(text)
    assert all(np.array_equal(a.tokens, b.tokens) for a, b in zip(rows, every, strict=False))


def test_samples_are_read_up_to_the_row(
    tokenizer: Tokenizer, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = Corpus("s", tuple(Passage(f"{n} {text}", Cut.SAMPLE) for n in range(5)))
    read = counted(tokenizer, monkeypatch)
    rows = make_rows(corpus, tokenizer, 64, 5, 42)
    assert next(read) < 5 * 64 * 7 + 5 * 300
    assert {tuple(row.tokens) for row in rows} == {
        tuple(tokenizer.encode(passage.text)[:64]) for passage in corpus.passages
    }


@pytest.mark.usefixtures("short")
def test_short_options_of_read_texts(tokenizer: Tokenizer, text: str, tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    path.write_text(text)
    few = decide(CalibrationOptions(str(path), samples=4, max_length=64))
    texts = read_texts(tokenizer, few, 64, None, 32, 4096)
    assert texts.rows is not None
    assert texts.chunks is not None
    assert [len(row) for row in texts.rows.rows] == [64] * 4
    assert (len(texts.chunks.chunks), texts.chunks.n_of_text) == (8, NOT_COUNTED)
