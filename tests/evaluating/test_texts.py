"""Texts cut as llama-perplexity cuts them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reap2gguf.errors import CalibrationError
from reap2gguf.evaluating import texts
from reap2gguf.evaluating.texts import HELD_OUT, WIKITEXT2, cut_text, read_text
from reap2gguf.tokenizer.tokenizer import Tokenizer
from tests.tiny import EXAMPLE


@pytest.fixture(scope="module")
def tokenizer() -> Iterator[Tokenizer]:
    tokenizer = Tokenizer(EXAMPLE)
    yield tokenizer
    tokenizer.close()


def test_the_second_half_of_each_chunk_is_scored(tokenizer: Tokenizer) -> None:
    text = "a word or two, and a number: 12345\n" * 200
    found = cut_text("some", text, tokenizer, 4096, 512)
    tokens = tokenizer.encode(text)
    assert found.record.n_chunks == len(tokens) // 512 == len(found.rows)
    assert found.record.n_tokens == 512 * len(found.rows)
    assert found.record.n_scored == 255 * len(found.rows)
    assert found.record.has_bos is (tokenizer.bos is not None)
    for number, row in enumerate(found.rows):
        assert np.array_equal(row.tokens, tokens[512 * number : 512 * (number + 1)])
        assert (row.first, row.n_scored) == (257, 255)


def test_each_chunk_begins_like_a_text(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "bos", 7)
    found = cut_text("some", "words and words\n" * 200, tokenizer, 4096, 64, 3)
    assert [int(row.tokens[0]) for row in found.rows] == [7, 7, 7]
    assert found.record.has_bos


def test_the_first_chunks(tokenizer: Tokenizer) -> None:
    text = "".join(f"line {number}\n" for number in range(400))
    all_of_it = cut_text("some", text, tokenizer, 4096, 64)
    some = cut_text("some", text, tokenizer, 4096, 64, 3)
    assert [row.tokens.tolist() for row in some.rows] == [
        row.tokens.tolist() for row in all_of_it.rows[:3]
    ]
    assert some.tokens_sha256 != all_of_it.tokens_sha256
    assert some.record.sha256 == all_of_it.record.sha256


def test_a_text_that_is_too_short(tokenizer: Tokenizer) -> None:
    with pytest.raises(CalibrationError, match="1 chunk of 64 tokens, expected at least 2"):
        cut_text("short.txt", "words and words\n" * 16, tokenizer, 4096, 64)


def test_tokens_that_the_model_does_not_have(tokenizer: Tokenizer) -> None:
    with pytest.raises(CalibrationError, match="vocab_size is 10; use the tokenizer of this"):
        cut_text("some", "words and words\n" * 100, tokenizer, 10, 64)


def test_a_file_is_named_without_its_folders(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("some text")
    assert read_text(str(tmp_path / "mine.txt"), print) == ("mine.txt", "some text")
    with pytest.raises(CalibrationError, match="none"):
        read_text(str(tmp_path / "none.txt"), print)


def test_the_held_out_text_is_in_no_mix() -> None:
    label, text = read_text(HELD_OUT, print)
    assert (label, len(text) > 100_000) == ("held-out", True)
    folder = texts.shipped_folder("calibration")
    assert '"held-out.txt"' not in (folder / "manifest.toml").read_text()


def test_wikitext_is_the_raw_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """The dataset has the lines of `wiki.test.raw`, but those of a space alone as nothing."""
    asked = []

    def dataset(component: Any, seed: int | None, note: Any, **_: Any) -> tuple[str, Iterator[Any]]:
        asked.append((component.dataset, component.subset, component.split, seed))
        return "commit", iter([{"text": ""}, {"text": " = Title = \n"}, {"text": ""}])

    monkeypatch.setattr(texts, "open_dataset", dataset)
    assert read_text(WIKITEXT2, print) == ("wikitext2", " \n = Title = \n \n")
    assert asked == [("Salesforce/wikitext", "wikitext-2-raw-v1", "test", None)]


def test_wikitext_without_a_network_is_named_as_the_text_that_it_is() -> None:
    """Tests run without a network: HF_HUB_OFFLINE is set."""
    with pytest.raises(CalibrationError) as refused:
        read_text(WIKITEXT2, print)
    assert str(refused.value) == (
        "text wikitext2 (Salesforce/wikitext on the Hub): HF_HUB_OFFLINE is set, and its records "
        "are not cached; unset it, or score another text: held-out, which is shipped, or a file "
        "of your own"
    )
