"""Texts are encoded in pieces, in groups, and only as far as asked."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from reap2gguf.errors import CalibrationError
from reap2gguf.resources import shipped_folder
from reap2gguf.tokenizer import tokenizer as module
from reap2gguf.tokenizer.tokenizer import TokenIds, Tokenizer
from tests.tiny import EXAMPLE


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(EXAMPLE)


@pytest.fixture
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups and pieces so small that a text has many."""
    monkeypatch.setattr(module, "_GROUP", 500)
    monkeypatch.setattr(module, "PIECE", 90)


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Everything that ships for calibration, and odd texts."""
    files = sorted(shipped_folder("calibration").glob("*.*"))
    shipped = [file.read_text(encoding="utf-8") for file in files]
    return ["", "x", *shipped, "  \n\n", "-" * 2000, "<|im_start|>user\nhi<|im_end|>\n" * 30, ""]


def whole(tokenizer: Tokenizer, text: str) -> TokenIds:
    return np.asarray(tokenizer._encoder.encode(text, add_special_tokens=False).ids)


@pytest.mark.usefixtures("small_groups")
def test_the_ids_are_those_of_the_whole_text(tokenizer: Tokenizer, texts: list[str]) -> None:
    found = list(tokenizer.encode_all(texts))
    assert len(found) == len(texts)
    for text, ids in zip(texts, found, strict=True):
        assert np.array_equal(ids, whole(tokenizer, text))
        assert ids.dtype == np.int64
        assert np.array_equal(tokenizer.encode(text), ids)


@pytest.mark.usefixtures("small_groups")
@pytest.mark.parametrize("at_least", [1, 7, 100, 3000, 10**9])
def test_only_as_far_as_asked(tokenizer: Tokenizer, texts: list[str], at_least: int) -> None:
    for text, ids in zip(texts, tokenizer.encode_all(texts, at_least), strict=True):
        every = whole(tokenizer, text)
        assert len(ids) >= min(at_least, len(every))
        assert np.array_equal(ids, every[: len(ids)])


@pytest.mark.usefixtures("small_groups")
def test_the_rest_is_not_read(
    tokenizer: Tokenizer, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    read = 0
    encode = tokenizer._batch

    def counted(group: list[str]) -> list[TokenIds]:
        nonlocal read
        read += sum(map(len, group))
        return encode(group)

    monkeypatch.setattr(tokenizer, "_batch", counted)
    long = "\n".join(texts * 3)
    assert len(long) > 300_000
    assert len(tokenizer.encode(long, 200)) >= 200
    assert read < 3000
    read = 0
    tokenizer.encode("-" * 20_000 + "\nabc " * 100, 2000)  # many letters for each token
    assert read > 10_000


def test_texts_are_taken_as_they_are_needed(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_GROUP", 100)
    taken = 0

    def endless() -> Iterator[str]:
        nonlocal taken
        while True:
            taken += 1
            yield f"text number {taken} " * 5

    found = tokenizer.encode_all(endless())
    for _ in range(5):
        next(found)
    found.close()  # type: ignore[attr-defined]
    assert taken <= 5 + 2 * 3, "two groups ahead at most"


def test_a_tokenizer_of_another_form_gets_whole_texts(
    tokenizer: Tokenizer, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "_in_pieces", False)
    groups: list[list[str]] = []
    encode = tokenizer._batch
    monkeypatch.setattr(tokenizer, "_batch", lambda group: groups.append(group) or encode(group))
    found = list(tokenizer.encode_all(texts, 5))
    assert groups == [[text] for text in texts]
    assert all(np.array_equal(a, whole(tokenizer, b)) for a, b in zip(found, texts, strict=True))
    assert tokenizer.next_cut("a b", 1) is None


@pytest.mark.usefixtures("small_groups")
def test_a_failure_in_a_thread_is_one_error(
    tokenizer: Tokenizer, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken:
        def encode_batch_fast(self, texts: list[str], add_special_tokens: bool) -> None:
            raise RuntimeError("no such merge")

    monkeypatch.setattr(tokenizer, "_encoder", Broken())
    with pytest.raises(CalibrationError, match=r"fails on the calibration text \(no such merge\)"):
        tokenizer.encode(texts[2])
