"""Tokenizers drawn by mutation: each is refused, or llama.cpp makes the same ids of a text."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from random import Random
from unicodedata import normalize

import pytest
from transformers import AutoTokenizer

from reap2gguf.errors import CheckpointError, UnsupportedModelError
from reap2gguf.models.tokenizer_families import QWEN
from reap2gguf.tokenizer.check import check_tokenizer
from tests.tokenizer.mutations import HARMFUL, HARMLESS, Draft
from tests.tokenizer.small import llama_cpp_tokenizer, mixed_text

LENGTH = 20_000  # characters
SIZE = 4200  # ids: the example's 4096, and some for more added tokens


def drawn(seed: int) -> Draft:
    """The example's tokenizer, with one to three harmless mutations and perhaps a harmful one."""
    draw = Random(seed)
    draft = Draft.of_example()
    for mutate in draw.sample(HARMLESS, draw.randint(1, 3)):
        mutate(draft, draw)
    if seed % 2:
        draw.choice(HARMFUL)(draft, draw)
    return draft


def outcome(draft: Draft, folder: Path, seed: int) -> str:
    """What becomes of a tokenizer: "refused", or "equal" after the ids were compared."""
    draft.write(folder)
    try:
        check_tokenizer(folder, SIZE, QWEN)
    except (CheckpointError, UnsupportedModelError):
        return "refused"
    text = with_tokens(mixed_text(seed, LENGTH), draft, Random(seed))
    reference = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    expected = reference(text, add_special_tokens=False)["input_ids"]
    with llama_cpp_tokenizer(folder, SIZE, QWEN) as llama:
        assert llama.encode(text) == expected
    return "equal"


def with_tokens(text: str, draft: Draft, draw: Random) -> str:
    """`text` with added tokens in it, whole and in part."""
    tokens = [token["content"] for token in draft.added]
    pieces = []
    for start in range(0, len(text), 100):
        token = draw.choice(tokens) + draw.choice(tokens)
        cut = draw.choice([0, 0, 1])
        pieces += [text[start : start + 100], " " * draw.randrange(2), token[cut:]]
    return normalize("NFC", "".join(pieces))


@pytest.mark.parametrize("mutate", HARMLESS)
def test_what_changes_nothing_is_accepted(mutate: object, tmp_path: Path) -> None:
    assert callable(mutate)
    draft = Draft.of_example()
    mutate(draft, Random(0))
    assert outcome(draft, tmp_path, seed=0) == "equal"


@pytest.mark.parametrize("mutate", HARMFUL)
def test_what_changes_ids_is_refused(mutate: object, tmp_path: Path) -> None:
    assert callable(mutate)
    draft = Draft.of_example()
    mutate(draft, Random(0))
    draft.write(tmp_path)
    with pytest.raises((CheckpointError, UnsupportedModelError), match=r"expected|must|use the"):
        check_tokenizer(tmp_path, SIZE, QWEN)


@pytest.mark.slow
def test_sixty_drawn_tokenizers(tmp_path: Path) -> None:
    found: Counter[str] = Counter()
    for seed in range(60):
        folder = tmp_path / str(seed)
        folder.mkdir()
        found[outcome(drawn(seed), folder, seed)] += 1
    assert found["equal"] >= 20
    assert found["refused"] >= 20
